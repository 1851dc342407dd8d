"""Files of the source besides weights and config that come with the result, and permissions."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

COPIED = {
    "preprocessor_config.json": '{"size": 224}',
    "video_preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "chat_template.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "added_tokens.json": "{}",
    "special_tokens_map.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2",
    "tokenizer.model": "sentencepiece",
    "qwen.tiktoken": "IQ== 0",
    "generation_config.json": '{"temperature": 0.6, "do_sample": true}',
}
LEFT_OUT = [
    ".hidden.json",
    ".cache/x.json",
    "README.md",
    "modeling_own.py",  # not trusted
    "trainer_state.json",
    "all_results.json",
    "optimizer.pt",
    "training_args.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.fp32.safetensors.index.json",
    "model.gguf",
    "events.out.tfevents.1",
]
RTN = [{"quantize": {"method": "rtn"}}]
SLICED = [{"slice": {"method": "drop", "keep": 0.9}}]


@pytest.fixture
def source(tiny_model_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "source"))
    for name, text in COPIED.items() | dict.fromkeys(LEFT_OUT, "other").items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("stages", [RTN, SLICED], ids=["quantized", "sliced"])
def test_companions_of_the_model_are_copied(
    stages: list[dict[str, Any]], source: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    compress(load_recipe(tiny_recipe(source, tmp_path / "run", stages=stages)), Machine("cpu"))
    checkpoint = tmp_path / "run/checkpoint"
    found = {str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file()}
    assert found.isdisjoint({*LEFT_OUT} - {"README.md"})
    for name, text in COPIED.items():
        assert (checkpoint / name).read_text() == text, name
    assert (
        COPIED.keys() <= json.loads((checkpoint / "lrc/manifest.json").read_text())["sha256"].keys()
    )


def test_another_tokenizer_replaces_all_files_of_the_first(
    source: Path, tiny_recipe: Callable[..., Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = {"path": str(source), "tokenizer": str(tiny_model_folder)}
    recipe = tiny_recipe(source, tmp_path / "run", model=model, stages=RTN)
    compress(load_recipe(recipe), Machine("cpu"))
    found = {f.name for f in (tmp_path / "run/checkpoint").iterdir()}
    assert found.isdisjoint({"tokenizer.model", "merges.txt", "vocab.json", "qwen.tiktoken"})
    assert {"preprocessor_config.json", "generation_config.json", "tokenizer.json"} <= found


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("stages", [RTN, SLICED], ids=["quantized", "sliced"])
def test_files_have_the_permissions_of_new_files(
    stages: list[dict[str, Any]], source: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (source / "tokenizer.model").chmod(0o700)
    compress(load_recipe(tiny_recipe(source, tmp_path / "run", stages=stages)), Machine("cpu"))
    modes = {
        str(f.relative_to(tmp_path)): oct(f.stat().st_mode & 0o777)
        for f in (tmp_path / "run").rglob("*")
        if f.name != "lock"
    }
    expected = {name: "0o750" if (tmp_path / name).is_dir() else "0o640" for name in modes}
    assert modes == expected
    assert "run/checkpoint/model.safetensors" in modes
