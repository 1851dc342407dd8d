"""Mixtures of experts as GGUF: the matrices of all experts of a layer are one tensor."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lrc.compressors.export.stored_weights import StoredWeights
from lrc.compressors.io.gguf_file import read_gguf
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, EXPERTS = 32, 4
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
    },
}
INT4 = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def sources(
    save_family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Any]]:
    """Return the folder and the model of every family."""
    base = tmp_path_factory.mktemp("experts")
    return {
        name: (
            base / name,
            save_family(base / name, model_type=name, num_experts_per_tok=2, **changes),
        )
        for name, changes in FAMILIES.items()
    }


def parts(matrices: Iterable[Tensor], leaf: str) -> dict[str, Tensor]:
    """Return the tensors of GGUF for the matrices [n_experts, rows, columns] of a leaf."""
    stacked = torch.stack(list(matrices))
    if leaf == "down_proj":
        return {"ffn_down_exps": stacked}
    gate, up = stacked.chunk(2, dim=1)
    return {"ffn_gate_exps": gate, "ffn_up_exps": up}


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_experts_are_read_back_bit_for_bit(
    family: str, sources: dict[str, tuple[Path, Any]], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    folder, model = sources[family]
    out = tmp_path / "out.gguf"
    ended = lrc("export", folder, out, "--format", "gguf")
    assert ended.code == 0, ended.err
    metadata, _ = read_gguf(out)
    arch = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}[family]
    assert metadata["general.architecture"] == arch
    assert metadata[f"{arch}.expert_count"] == EXPERTS
    assert metadata[f"{arch}.expert_used_count"] == 2
    if family == "qwen3_moe":
        assert metadata[f"{arch}.expert_feed_forward_length"] == WIDTH
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for layer, block in enumerate(model.model.layers):
        expected = {"ffn_gate_inp": block.mlp.gate.weight.detach()}
        for leaf in ("gate_up_proj", "down_proj"):
            expected |= parts(getattr(block.mlp.experts, leaf).detach(), leaf)
        for name, values in expected.items():
            stored = tensors[f"blk.{layer}.{name}.weight"]
            assert stored.shape.tolist() == list(reversed(values.shape))
            assert np.array_equal(stored.data, values.numpy()), name
    assert len([name for name in tensors if "exps" in name]) == 3 * len(model.model.layers)


def test_experts_of_one_scheme_are_stored_as_integers_and_others_in_a_requested_type(
    sources: dict[str, tuple[Path, Any]],
    tiny_recipe: Callable[..., Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder, _ = sources["qwen3_moe"]
    dense = "model.layers.1.mlp.experts.1.down_proj"
    stages = [{"quantize": {**INT4, "ignore": [dense]}}]
    compress(load_recipe(tiny_recipe(folder, tmp_path / "run", stages=stages)), Machine("cpu"))
    checkpoint, out = tmp_path / "run/checkpoint", tmp_path / "out.gguf"
    arguments = ("export", checkpoint, out, "--format", "gguf")
    lrc(*arguments).refuses(1, "are stored in different types", "--type f16", code="cannot-export")
    ended = lrc(*arguments, "--type", "f32", "--json")
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    assert facts["roles"]["integers"] == 2 * (4 + 3) - 1
    assert facts["roles"]["products"] == 1
    assert not any("more space" in note for note in facts["notes"])
    weights = StoredWeights(checkpoint)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for layer in range(2):
        for leaf in ("gate_up_proj", "down_proj"):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{leaf}" for e in range(EXPERTS)]
            kind = "F32" if dense in names else "Q4_0"
            matrices = []
            for name in names:
                if name == dense:
                    matrices.append(weights.read(f"{name}.weight").float())
                else:
                    codes, scale, _ = weights.integers(name)
                    matrices.append(codes * scale.float().repeat_interleave(32, dim=1))
            for name, values in parts(matrices, leaf).items():
                stored = tensors[f"blk.{layer}.{name}.weight"]
                assert stored.tensor_type.name == kind
                found = gguf.quants.dequantize(stored.data, stored.tensor_type)
                if kind == "Q4_0":
                    assert np.array_equal(found, values.numpy()), name
                else:  # products are computed in the dtype of the checkpoint
                    assert np.abs(found - values.numpy()).max() <= 2**-8 * values.abs().max()
                    assert np.array_equal(found[1], values[1].numpy())
