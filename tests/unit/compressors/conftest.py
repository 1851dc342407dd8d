"""A saved tiny Llama of three layers, its skeleton and its weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.configs.recipe import Model


@pytest.fixture
def source(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def architecture(source: Path) -> Architecture:
    return build(locate(Model(path=str(source), dtype="float32")))


@pytest.fixture
def reader(source: Path, architecture: Architecture) -> WeightReader:
    return WeightReader(source, architecture)
