"""Continuations of prompts by two models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors.evaluate.generations import compare_continuations, read_prompts
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.recipe import Generations


def test_the_first_difference_is_counted_in_new_tokens(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """One token is made impossible: the text is the same until it would have been written."""
    dense, compressed = tiny_llama(), tiny_llama()
    same = compare_continuations(dense, compressed, tiny_tokenizer, "def f(x):", 12)
    assert same["first_difference"] is None
    assert same["dense"] == same["compressed"]
    assert same["new_tokens"]["dense"] == same["new_tokens"]["compressed"] > 0

    ids = tiny_tokenizer("def f(x):", return_tensors="pt").input_ids  # [1, n]
    with torch.no_grad():
        expected = []
        for _ in range(12):
            ids = torch.cat([ids, dense(ids).logits[:, -1:].argmax(-1)], dim=1)
            expected.append(int(ids[0, -1]))
    assert same["dense"] == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    forbidden = expected[5]
    compressed.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    compressed.lm_head.bias.data[forbidden] = -1e9
    found = compare_continuations(dense, compressed, tiny_tokenizer, "def f(x):", 12)
    assert found["first_difference"] == expected.index(forbidden)
    assert (found["prompt"], found["dense"]) == ("def f(x):", same["dense"])
    assert found["compressed"] != found["dense"]


def test_a_text_that_ends_earlier_differs_where_it_ends(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    dense, compressed = tiny_llama(), tiny_llama()
    compressed.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    compressed.lm_head.bias.data[1] = 1e9  # </s>
    found = compare_continuations(dense, compressed, tiny_tokenizer, "a", 5)
    assert found["new_tokens"] == {"dense": 5, "compressed": 1}
    assert (found["first_difference"], found["compressed"]) == (0, "")


def test_prompts_are_lines_or_rows(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("one\n\ntwo\n  \nthree", encoding="utf-8")
    rows.write_text("\n".join(json.dumps({"prompt": p}) for p in ("a\nb", "c")), encoding="utf-8")
    assert read_prompts(Generations(prompts=["zero"], file=str(text))) == [
        *("zero", "one", "two", "three")
    ]
    assert read_prompts(Generations(file=str(rows))) == ["a\nb", "c"]
    assert read_prompts(Generations()) == []


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    def refused(name: str, content: str | None, error: type[Exception], words: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_text(content, encoding="utf-8")
        with pytest.raises(error, match=words):
            read_prompts(Generations(file=str(path)))

    refused("no.txt", None, RecipeError, r"generations\.file: no such file")
    refused("c4", None, RecipeError, r"generations\.file: must be the path of a \.jsonl or \.txt")
    refused("blank.txt", "\n \n", DataError, "holds no text")
    refused("other.jsonl", '{"text": "a"}', DataError, "line 1: no key 'prompt'")
