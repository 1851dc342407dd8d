"""Texts, tokenizers and windows that a run cannot use are refused before the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty.txt": (b"", ("the file is empty; give a file with text",)),
    "blank.txt": (b" \n\n \n", ("holds no text",)),
    "binary.txt": (b"\x00\x01\xff", ("must be UTF-8 text, got NUL bytes", "convert it")),
    "latin.txt": (b"caf\xe9", ("got byte 0xe9 at offset 3",)),
    "short.txt": (b"a few words", ("holds", "tokens", "lower")),
    "empty.jsonl": (b"", ("the file is empty",)),
    "binary.jsonl": (b'{"text": "\x00"}', ("must be UTF-8 text, got NUL bytes",)),
    "bad.jsonl": (b'{"text": "a"}\n{"text"\n', ("line 2: must be one JSON object",)),
    "other.jsonl": (b'{"body": "a"}\n', ("line 1: no key 'text'; got 'body'", "under 'field'")),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("key", ["calibration.source", "evaluate.perplexity.0.source"])
def test_texts_that_cannot_be_used_are_refused_before_the_work(
    lrc, recipe: Path, output: Path, name: str, key: str, tmp_path: Path
) -> None:
    content, words = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    lrc("compress", recipe, f"{key}={tmp_path / name}").refuses(1, *words, code="invalid-text")
    left = {f.name for f in output.rglob("*")}
    assert left <= {"work", "lock", "run.json", "seconds.json", "estimate.json"}


def test_too_few_tokens_for_calibration(lrc, recipe: Path, output: Path) -> None:
    ended = lrc("compress", recipe, "calibration.samples=9999")
    ended.refuses(
        1, "9,999 x 64 = 639,936; lower calibration.samples to at most", code="invalid-text"
    )
    assert not (output / "checkpoint").exists()
    # The suggested change needs no --overwrite, because that run has no results.
    assert lrc("compress", recipe, "calibration.samples=5", "-q").code == 0


def test_a_tokenizer_of_another_model(
    lrc, tiny_llama: Callable[..., Any], make_tokenizer: Callable[..., Any], recipe: Path
) -> None:
    model = recipe.parent / "small"
    tiny_llama(vocab_size=300).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    for override in ((), ("evaluate={}",)):
        ended = lrc("compress", recipe, f"model={model}", *override)
        ended.refuses(1, "model.tokenizer", "300 tokens", code="invalid-text")


def test_a_window_with_bos_that_leaves_a_table_of_positions(
    lrc, make_tokenizer: Callable[..., Any], recipe: Path
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=512, num_attention_heads=4, max_position_embeddings=64, **sizes)
    OPTForCausalLM(config).save_pretrained(recipe.parent / "opt")
    make_tokenizer(bos=True).save_pretrained(recipe.parent / "opt")
    run = ("compress", recipe, f"model={recipe.parent / 'opt'}", "-q")
    lrc(*run, "evaluate.perplexity.0.window=64").refuses(2, "must be at most 63", "64 positions")
    assert lrc(*run, "evaluate.perplexity.0.window=63").code == 0
