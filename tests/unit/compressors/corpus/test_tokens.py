"""Tokenizing in chunks gives the tokens of the whole text, for every kind of tokenizer."""

import json
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lrc.compressors.corpus import tokens
from lrc.compressors.corpus.documents import read_documents
from lrc.compressors.corpus.excerpts import joined
from lrc.compressors.corpus.tokens import tokenize

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
UNKNOWN = {"unk_token": "<unk>", "special_tokens": ["<unk>"]}


def byte_level(pattern=None):
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    return pre_tokenizers.Sequence([*split, last])


def llama2(text):
    """BPE over the whole text, without a split into words, and with bytes for unknown letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=800, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    content = json.loads(tokenizer.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
    }
    content["pre_tokenizer"] = None
    content["model"]["byte_fallback"] = True
    vocabulary = content["model"]["vocab"]
    first = len(vocabulary)
    vocabulary |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(content))


def trained(model, pre_tokenizer, trainer, text, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    text = list(read_documents("python-docs", part="calibration"))[:20]
    bytes_bpe = trainers.BpeTrainer(vocab_size=600, initial_alphabet=ALPHABET, show_progress=False)
    accents = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    unigram = trainers.UnigramTrainer(vocab_size=600, show_progress=False, **UNKNOWN)
    wordpiece = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=["<unk>"], show_progress=False
    )
    found = {
        "gpt2": trained(models.BPE(), byte_level(), bytes_bpe, text),
        "llama3": trained(models.BPE(), byte_level(LLAMA3), bytes_bpe, text),
        "llama2": llama2(text),
        "unigram": trained(models.Unigram(), pre_tokenizers.Metaspace(), unigram, text),
        "wordpiece": trained(
            models.WordPiece(unk_token="<unk>"),
            pre_tokenizers.Whitespace(),
            wordpiece,
            text,
            accents,
        ),
    }
    return {
        name: PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        for name, tokenizer in found.items()
    }


def english():
    documents = map(str, read_documents("python-docs", part="evaluation"))
    return "".join(joined(documents))[:60_000]


def mixture():
    draw = random.Random(1)
    parts = ["é", "漢字", "🙂", "\n", " ", "   ", "a", "\t", "word ", "aaaa", "=" * 21, "\n\n"]
    return "".join(draw.choice(parts) for _ in range(20_000))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("make", [english, mixture])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "unigram", "wordpiece"])
def test_chunks_give_the_tokens_of_the_whole(tokenizers, name, make, fast, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 3000)
    monkeypatch.setattr(tokens, "OVERLAP", 500)
    tokenizer, text = tokenizers[name], make()
    whole = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not fast:
        monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert torch.equal(tokenize(text, tokenizer), whole)
    for limit in (99, 999):  # of which the first needs shorter chunks
        pieces = (text[start : start + 777] for start in range(0, len(text), 777))
        assert torch.equal(tokenize(pieces, tokenizer, limit=limit), whole[:limit])
        if fast:
            assert next(pieces, None) is not None  # the rest was not read


@pytest.mark.parametrize("length", [0, 1, 2999, 3000, 3001, 5500])
def test_texts_of_the_length_of_chunks(tiny_tokenizer, length, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 3000)
    monkeypatch.setattr(tokens, "OVERLAP", 500)
    text = english()[:length]
    assert tiny_tokenizer.decode(tokenize(text, tiny_tokenizer)) == text


def test_an_endless_word_is_cut_and_nothing_is_lost(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 300)
    monkeypatch.setattr(tokens, "OVERLAP", 50)
    draw = random.Random(0)
    for text in ("e" * 2000, "".join(draw.choice("etaoin") for _ in range(3000))):
        assert tiny_tokenizer.decode(tokenize(text, tiny_tokenizer)) == text
