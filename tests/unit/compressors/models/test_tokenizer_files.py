"""A tokenizer that cannot be loaded: the error names the file and what to do."""

import json
import shutil

import pytest

from lrc.compressors.checkpoint.reader import load_tokenizer as load_checkpoint_tokenizer
from lrc.compressors.models import tokenizer_files
from lrc.compressors.models.source import load_tokenizer, locate
from lrc.configs.errors import CheckpointError, ModelError
from lrc.configs.recipe import Model

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TIKTOKEN = b"IQ== 0\nIg== 1\n"
LLAMA = b'{"tokenizer_class": "LlamaTokenizer"}'


@pytest.fixture(autouse=True)
def _no_other_packages(monkeypatch):
    for package in ("sentencepiece", "protobuf", "tiktoken"):
        monkeypatch.setattr(tokenizer_files, f"is_{package}_available", lambda: False)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no tokenizer.json, vocabulary or tokenizer.model"]),
        ({"tokenizer.model": SENTENCEPIECE}, ["`pip install sentencepiece protobuf`"]),
        (
            {"tokenizer.model": SENTENCEPIECE, "tokenizer_config.json": LLAMA},
            ["tokenizer.model", "`pip install sentencepiece protobuf`"],
        ),
        ({"spiece.model": SENTENCEPIECE}, ["spiece.model", "sentencepiece protobuf"]),
        ({"tokenizer.model": TIKTOKEN}, ["`pip install tiktoken`"]),
        ({"vocab.json": b'{"a": 0}'}, ["merges.txt", "missing"]),
        ({"tokenizer.json": b'{"a'}, ["tokenizer.json is not JSON", "line 1"]),
        ({"tokenizer.json": b""}, ["tokenizer.json is not JSON"]),
        ({"tokenizer.json": b"[]"}, ["tokenizer.json must be a JSON object"]),
        ({"tokenizer.json": b"\xff\xfe"}, ["tokenizer.json is not JSON"]),
        ({"tokenizer.json": b"{}"}, ["tokenizer.json does not describe a tokenizer"]),
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"a'}, ["tokenizer_config.json is"]),
    ],
)
def test_the_cause_is_named(tiny_model_folder, tmp_path, files, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    good = (folder / "tokenizer.json").read_bytes()
    for file in folder.glob("*token*"):
        file.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(good if content is None else content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(locate(Model(path=str(folder))))
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_tokenizer(folder)
    for word in words:
        assert word in str(caught.value)


def test_a_good_tokenizer_needs_no_package(tiny_model_folder):
    assert len(load_tokenizer(locate(Model(path=str(tiny_model_folder))))) == 512
    assert json.loads((tiny_model_folder / "config.json").read_text())["vocab_size"] == 512
