"""Tokenizers in GGUF: rules of llama.cpp are found from tokenizer.json, or it is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrc.compressors.export.gguf_tokenizer import PATTERNS, folder_tokenizer, gguf_tokenizer
from lrc.configs.errors import ExportError

Save = Callable[..., Path]


@pytest.fixture
def save(make_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path) -> Save:
    """Save the tiny tokenizer with other rules of splitting."""

    def write(pre_tokenizer: Any = None, normalizer: Any = None, **options: Any) -> Path:
        tokenizer = make_tokenizer(**options)
        if pre_tokenizer is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            tokenizer.backend_tokenizer.normalizer = normalizer
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return write


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_splits_by_known_patterns_have_names(pattern: str, save: Save) -> None:
    keys = folder_tokenizer(save(split(pattern)), 512)
    assert keys["tokenizer.ggml.pre"] == PATTERNS[pattern]


def test_single_digits_before_the_bytes_are_those_of_smollm(save: Save) -> None:
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    keys = folder_tokenizer(save(pre_tokenizers.Sequence(steps)), 512)
    assert keys["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [
        (split(r"\w+"), None),
        (pre_tokenizers.Whitespace(), None),
        (pre_tokenizers.Digits(individual_digits=False), None),
        (None, normalizers.Lowercase()),
    ],
)
def test_unknown_rules_are_refused(pre_tokenizer: Any, normalizer: Any, save: Save) -> None:
    with pytest.raises(ExportError, match=r"no rule of llama.cpp is known.*--tokenizer FILE.gguf"):
        folder_tokenizer(save(pre_tokenizer, normalizer), 512)


def test_rows_without_a_token_are_unused_and_tokens_without_a_row_are_refused(save: Save) -> None:
    folder = save(bos=True, chat_template="{{ messages }}")
    keys = folder_tokenizer(folder, 520)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 520
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD519]"
    kinds = keys["tokenizer.ggml.token_type"]
    assert [kinds[0], kinds[5], kinds[-1]] == [
        TokenType.CONTROL,
        TokenType.NORMAL,
        TokenType.UNUSED,
    ]
    assert keys["tokenizer.ggml.add_bos_token"]
    assert not keys["tokenizer.ggml.add_eos_token"]
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    with pytest.raises(ExportError, match="ids up to 511, the embedding only 511 rows"):
        folder_tokenizer(folder, 511)


def test_pieces_have_the_scores_of_their_merges(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "\u2581": 2, "a": 3, "b": 4, "ab": 5, "\u2581ab": 6}
    merges = [("a", "b"), ("\u2581", "ab")]
    bpe = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>").save_pretrained(tmp_path)
    keys = folder_tokenizer(tmp_path, 7)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.scores"][5:] == [0.0, -1.0]
    kinds = keys["tokenizer.ggml.token_type"]
    assert kinds[:2] == [TokenType.UNKNOWN, TokenType.BYTE]
    assert not keys["tokenizer.ggml.add_space_prefix"]


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"none")
    with pytest.raises(ExportError, match="--tokenizer"):
        gguf_tokenizer(tmp_path / "x.gguf", 512)
