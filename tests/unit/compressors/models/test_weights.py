"""Tensors by the names of the module tree, from files that may name them differently."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tiny_llama, tmp_path):
    """Return the folder of a tiny Llama in float32."""
    tiny_llama().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def skeleton(folder: Path, dtype: str = "float32") -> Architecture:
    return build(locate(Model(path=str(folder), dtype=dtype)))


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Replace or, with None, leave out tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    kept = {**tensors, **changes}
    save_file({n: t for n, t in kept.items() if t is not None}, folder / "model.safetensors")


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n.replace(old, new, 1): t for n, t in tensors.items()}, folder / "model.safetensors")


def test_tensors_are_read_in_the_dtype_of_the_recipe(source):
    stored = load_file(source / "model.safetensors")[UP]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reader = WeightReader(source, skeleton(source, str(dtype).removeprefix("torch.")))
        assert torch.equal(reader.read(UP), stored.to(dtype))
        assert reader.read(UP).dtype == dtype


def test_what_is_read_is_a_copy(source):
    """A file that stays mapped would be held in memory, and could change under a run."""
    reader = WeightReader(source, skeleton(source))
    before = reader.read(UP)
    kept = before.clone()
    before.zero_()
    assert torch.equal(reader.read(UP), kept)


@pytest.mark.parametrize(("old", "new"), [("model.", ""), ("model.", "model.model.")])
def test_a_missing_prefix_is_added_and_a_superfluous_one_is_removed(source, old, new):
    expected = load_file(source / "model.safetensors")[UP]
    architecture = skeleton(source)
    rename(source, old, new)
    assert torch.equal(WeightReader(source, architecture).read(UP), expected)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_tensor_is_found_under_either_name(tiny_llama, tmp_path, stored):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    architecture = skeleton(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rename(tmp_path, "model.embed_tokens.weight", stored)
    reader = WeightReader(tmp_path, architecture)
    assert torch.equal(reader.read("model.embed_tokens.weight"), expected)
    assert "lm_head.weight" not in reader


def test_missing_and_misshapen_tensors_are_reported_together(source):
    architecture = skeleton(source)
    edit(source, **{UP: torch.zeros(3, 5), "model.norm.weight": None})
    with pytest.raises(ModelError) as caught:
        WeightReader(source, architecture)
    assert f"{UP} is [3, 5], not [48, 32]" in str(caught.value)
    assert "model.norm.weight is missing" in str(caught.value)


def test_a_long_list_of_problems_is_cut(source):
    architecture = skeleton(source)
    save_file({"x": torch.zeros(1)}, source / "model.safetensors")
    count = len(architecture.stored_parameters())
    with pytest.raises(ModelError, match=rf"\(and {count - 5} more\)"):
        WeightReader(source, architecture)


def test_a_truncated_file_is_named(source):
    architecture = skeleton(source)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors.*not a whole safetensors file"):
        WeightReader(source, architecture)


@pytest.mark.parametrize("damage", ["shard", "index", "map"])
def test_an_incomplete_set_of_shards_is_rejected(tiny_llama, tmp_path, damage):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    architecture = skeleton(tmp_path)
    assert UP in WeightReader(tmp_path, architecture)
    index = tmp_path / "model.safetensors.index.json"
    if damage == "shard":
        sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    else:
        index.write_text("{" if damage == "index" else json.dumps({"weight_map": 3}))
    with pytest.raises(ModelError, match="copy or download it again"):
        WeightReader(tmp_path, architecture)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_numbers_that_are_not_finite_are_named_when_read(source, value):
    """A hundred thousand is finite, but not in float16."""
    weight = load_file(source / "model.safetensors")[UP]
    weight[3, 4] = value
    edit(source, **{UP: weight})
    reader = WeightReader(source, skeleton(source, "float16"))
    with pytest.raises(ModelError, match=f"{UP} holds NaN or Inf.*float16"):
        reader.read(UP)


def test_filling_and_emptying_leaves_the_skeleton_as_it_was(source):
    architecture = skeleton(source)
    reader = WeightReader(source, architecture)
    model = architecture.model
    before = {name: (p.shape, p.dtype, p.device.type) for name, p in model.named_parameters()}
    assert {device for *_, device in before.values()} == {"meta"}
    tables = {name: b.clone() for name, b in model.named_buffers()}

    reader.fill_("model", device="cpu", dtype=torch.float32, skip=["model.layers.0"])
    filled = {name for name, p in model.named_parameters() if not p.is_meta}
    assert filled == {
        name
        for name in before
        if name.startswith("model.") and not name.startswith("model.layers.0.")
    }
    stored = load_file(source / "model.safetensors")
    assert all(torch.equal(model.get_parameter(name), stored[name]) for name in filled)

    reader.empty_("model")
    after = {name: (p.shape, p.dtype, p.device.type) for name, p in model.named_parameters()}
    assert after == before
    assert tables
    for name, table in model.named_buffers():  # computed, not stored: they cannot be read again
        assert torch.equal(table, tables[name])


def test_filling_a_module_in_another_dtype_does_not_change_the_dtype_of_reading(source):
    architecture = skeleton(source, "bfloat16")
    first = WeightReader(source, architecture)
    first.fill_("model.layers.1", device="cpu", dtype=torch.float32)
    first.empty_("model.layers.1")
    assert WeightReader(source, architecture).read(UP).dtype == torch.bfloat16
