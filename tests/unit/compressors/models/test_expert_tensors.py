"""Experts are read one by one from every layout of files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_experts import FAMILIES, tiny_experts

from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import locate
from lrc.compressors.models.source_check import check_contents
from lrc.compressors.models.weights import WeightReader
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model


def saved(folder: Path, model: Any, *, published: bool = True) -> Path:
    """Save a model with the names and shapes of its publication, or with those of its class."""
    model.save_pretrained(folder)
    if not published:
        tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.w"}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def checked(folder: Path) -> Architecture:
    source = locate(Model(path=str(folder), dtype="float32"))
    _, architecture, warnings = check_contents(source, build(source))
    assert not warnings
    return architecture


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_experts_are_the_parameters_of_the_class(family, published, tmp_path):
    model = tiny_experts(family)
    folder = saved(tmp_path / "source", model, published=published)
    architecture = checked(folder)
    reader, state = WeightReader(folder, architecture), model.state_dict()
    fused = architecture.fused_tensors()
    assert fused
    for name, (tensor, parts) in fused.items():
        assert torch.equal(tensor.join([reader.read(part) for part in parts]), state[name])
    others = architecture.stored_parameters().keys() - {p for _, ps in fused.values() for p in ps}
    assert all(torch.equal(reader.read(name), state[name]) for name in others)


def test_files_have_one_tensor_per_expert_where_the_family_was_published_so(tmp_path):
    names = {
        family: load_file(saved(tmp_path / family, tiny_experts(family)) / "model.safetensors")
        for family in ("mixtral", "gpt_oss")
    }
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names["mixtral"]
    assert "model.layers.0.mlp.experts.down_proj" in names["gpt_oss"]


def test_a_missing_matrix_of_one_expert_is_named(tmp_path):
    folder = saved(tmp_path / "source", tiny_experts("qwen3_moe"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.4\.down_proj\.weight is miss"):
        checked(folder)


def test_a_missing_half_of_a_matrix_is_named(tmp_path):
    folder = saved(tmp_path / "source", tiny_experts("qwen3_moe"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    name = r"layers\.1\.mlp\.experts\.4\.gate_up_proj\.weight is \[24, 32\], not \[48, 32\]"
    with pytest.raises(ModelError, match=name):
        checked(folder)
