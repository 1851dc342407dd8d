"""Channels and heads that are trained: which they are, and that nothing else changes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.compressors.heal.adapter_kinds import adaptable
from lrc.compressors.heal.trained_slices import coupled_layers, sliced_matrices

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8}
GATED = {"intermediate_size": 40, "num_key_value_heads": 4, "head_dim": 4}


def model(model_type: str, **changes: int) -> Any:
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


@pytest.fixture(scope="module")
def llama() -> Any:
    return model("llama", **GATED)


def places(root: nn.Module, **options: Any) -> dict[str, tuple[int, list[int]]]:
    """Return dimension and places of every slice by the last name of its layer."""
    found = sliced_matrices(
        root, adaptable(root), SimpleNamespace(**{"fraction": 0.1, "choose": "random", **options})
    )
    generator = torch.Generator().manual_seed(0)
    adapters: dict[str, Any] = {name: make(generator) for name, (_, make) in found.items()}
    return {
        name.split(".")[-2]: (each._dim, each.places.tolist()) for name, each in adapters.items()
    }


def test_the_usual_names_are_found(llama: Any) -> None:
    (heads, mlp) = coupled_layers(llama)
    layer = "model.layers.0"
    assert mlp.rows == (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
    assert mlp.columns == f"{layer}.mlp.down_proj"
    assert mlp.n_units == 40
    assert heads.rows == (f"{layer}.self_attn.v_proj",)
    assert heads.columns == f"{layer}.self_attn.o_proj"
    assert heads.n_units == 4
    opt = [*coupled_layers(model("opt", ffn_dim=24, word_embed_proj_dim=32))]
    assert [(each.columns.split(".")[-1], each.n_units) for each in opt] == [
        ("fc2", 24),
        ("out_proj", 8),
    ]


def test_an_mlp_has_the_same_channels_in_all_matrices(llama: Any) -> None:
    found = places(llama)
    assert {*found} == {"gate_proj", "up_proj", "down_proj"}  # a tenth of four heads is none
    (_, channels) = found["down_proj"]
    assert len({*channels}) == 4
    assert found == {
        "gate_proj": (0, channels),
        "up_proj": (0, channels),
        "down_proj": (1, channels),
    }


def test_values_of_a_head_reach_the_outputs_of_its_columns_only(llama: Any) -> None:
    found = places(llama, fraction=0.25)
    (dim, rows), (across, columns) = found["v_proj"], found["o_proj"]
    assert (dim, across) == (0, 1)
    assert len(rows) == 4
    assert len(columns) == 8
    # Of the columns that read a changed head, all are chosen, and no others.
    attention = llama.model.layers[0].self_attn
    before = attention.v_proj.weight.clone()
    seen: list[Tensor] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        llama(ids)
        attention.v_proj.weight[rows] += 1.0
        llama(ids)
        attention.v_proj.weight.copy_(before)
    hook.remove()
    differs = (seen[0] != seen[1]).flatten(0, 1).any(0)
    assert differs.nonzero().flatten().tolist() == columns


def test_channels_with_the_largest_weights_can_be_chosen(llama: Any) -> None:
    mlp = llama.model.layers[0].mlp
    before = mlp.up_proj.weight.clone()
    largest = [3, 11, 12, 30]
    with torch.no_grad():
        mlp.up_proj.weight[largest] *= 10
        found = places(llama, choose="norm")
        mlp.up_proj.weight.copy_(before)
    assert found["gate_proj"] == (0, largest)


def test_only_matrices_that_are_given_are_sliced(llama: Any) -> None:
    matrices = {n: each for n, each in adaptable(llama).items() if "up_proj" in n}
    found = sliced_matrices(llama, matrices, SimpleNamespace(fraction=0.1, choose="random"))
    assert {*found} == {"model.layers.0.mlp.up_proj.weight"}
