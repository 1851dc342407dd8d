"""Models that cannot be processed layer by layer are rejected from their shapes alone."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from lrc.compressors.calibrate.layer_check import (
    _close,
    build_checked,
    check_layers,
    differing_layer,
)
from lrc.compressors.models.architecture import Architecture, build, describe
from lrc.compressors.models.source import Source
from lrc.compressors.slicing.drop import _keep_layers_
from lrc.compressors.slicing.layout import skeleton
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512, "state_size": 8}
BAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "attn_layer_indices": [1],
}
RECURRENT = {
    "lru_width": 64,
    "attention_window_size": 16,
    "block_types": ["recurrent", "attention"],
}
MINICPM3 = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
}


def checked(model_type: str, **changes: Any) -> Architecture:
    sizes = {} if model_type in ("mamba", "rwkv") else SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    return build_checked(Source(Model(path="m"), Path("m"), config, weights_local=False))


class _Twice(nn.ModuleList):
    """Layers of which the first is called again at the end."""

    def __getitem__(self, index: Any) -> Any:
        found: Any = super().__getitem__(index)
        return [*found, found[0]] if isinstance(index, slice) else found


def llama() -> Architecture:
    config = AutoConfig.for_model("llama", **SIZES)
    return build(Source(Model(path="m"), Path("m"), config, weights_local=False))


def test_a_layer_that_is_called_twice_is_rejected() -> None:
    found = llama()
    found.model.model.layers = _Twice(found.model.model.layers)
    with pytest.raises(ModelError, match="2 times, not once"):
        check_layers(found)


def test_a_linear_that_is_called_twice_stays_dense() -> None:
    found = llama()
    mlp = found.model.model.layers[1].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(x) + mlp.down_proj(mlp.up_proj(x))
    names = {f"model.layers.1.mlp.{name}" for name in ("up_proj", "down_proj")}
    assert {*check_layers(found).unused} == names


def test_a_tower_larger_than_the_text_model_is_not_the_decoder() -> None:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "num_hidden_layers": 2}
    found = checked("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert found.layer_names == [f"model.language_model.layers.{i}" for i in range(2)]


SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "falcon": {},  # another class of linear layer, which computes the same
    "bamba": BAMBA,  # its layers return two tensors, and are of two kinds
    "recurrent_gemma": RECURRENT,  # parameters of three dimensions that are no experts
    "jamba": {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "mamba": MAMBA,
    "minicpm3": MINICPM3,
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2},  # its masks are stored buffers
}


@pytest.mark.parametrize("family", SERVED)
def test_families_whose_layers_form_a_chain_are_accepted(family: str) -> None:
    found = checked(family, **SERVED[family])
    assert len(found.layers) == 4
    assert found.linears
    assert not {linear.name for linear in found.linears} & {*found.unused}
    assert all(p.is_meta for p in found.model.parameters())
    assert not any("forward" in vars(module) for module in found.model.modules())


REJECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "arguments by token": (
        "'per_layer_input', which depends on the tokens",
        {"model_type": "gemma4_text", "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "four streams": (
        r"have the shape \[4, 2, 8, 64\]",
        {"model_type": "gemma3n_text", "num_kv_shared_layers": 0},
    ),
    "an encoder": ("depend on later tokens", {"model_type": "bert"}),
    "shared attention": (
        "'original_hidden_states'",
        {
            "model_type": "zamba2",
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_mem_blocks": 1,
        },
    ),
    "a division outside the layers": (
        "is changed outside the layers",
        {"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512}
        | {"rescale_every": 2},
    ),
    "fused experts": ("holds fused experts", {"model_type": "jetmoe", "num_local_experts": 4}),
    "a layer that is called for every layer": (
        "calls encoder.albert_layer_groups.0 4 times, not once",
        {"model_type": "albert", "architectures": ["AlbertModel"]},
    ),
    "no mask": ("depend on padding", {"model_type": "fnet", "architectures": ["FNetModel"]}),
}


@pytest.mark.parametrize("case", REJECTED)
def test_others_are_rejected_with_the_reason(case: str) -> None:
    reason, config = REJECTED[case]
    start = time.monotonic()
    with pytest.raises(ModelError, match=reason) as error:
        checked(**config)
    assert error.value.code == "invalid-model"
    assert time.monotonic() - start < 60  # a second on an idle machine


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize(("family", "prefix"), [("distilbert", "DistilBert"), ("gte", "Gte")])
def test_encoders_are_accepted(family: str, prefix: str, head: str) -> None:
    found = checked(family, architectures=[prefix + head], n_layers=4, dim=64, hidden_dim=96)
    assert type(found.model).__name__ == prefix + head
    assert len(found.layers) == 4
    assert found.kind.encoder
    assert found.kind.classifies == (head != "Model")
    assert all("layer" in linear.name for linear in found.linears)


def test_a_bert_without_a_head_is_not_taken_for_a_decoder_unless_it_is_one() -> None:
    assert checked("bert", is_decoder=True).linears


def test_a_large_model_is_checked_without_memory_for_its_weights() -> None:
    """70 billion parameters."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    found = build_checked(Source(Model(path="m"), Path("m"), config, weights_local=False))
    assert len(found.linears) == 28


def test_linears_that_a_kernel_reads_stay_dense() -> None:
    found = checked("mamba", **MAMBA)
    assert {name.rpartition(".")[2] for name in found.unused} == {"x_proj", "dt_proj", "out_proj"}
    assert {linear.name.rpartition(".")[2] for linear in found.linears} == {"in_proj"}
    assert "is read by MambaMixer" in found.unused["backbone.layers.0.mixer.dt_proj"]


@pytest.mark.parametrize(
    ("family", "changes", "difference"),
    [
        ("llama", {}, ""),
        ("minicpm3", MINICPM3, "computes something else"),  # its residuals scale with the depth
        ("diffllama", {}, "computes something else"),  # a constant by the index of the layer
    ],
)
def test_a_constant_that_depends_on_the_depth_is_found(family, changes, difference) -> None:
    old = checked(family, **changes)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    _keep_layers_(config, [1, 2])
    new = describe(skeleton(old, config))
    found = differing_layer(old, new, [1, 2])
    assert (difference in found) if difference else found == ""
    assert all(p.is_meta for p in (*old.model.parameters(), *new.model.parameters()))


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ([5.0, 7.0, 0.0], [0.0, -torch.inf, 1.0], False),
        ([0.0, -torch.inf, 0.0], [0.0, 0.0, -torch.inf], False),
        ([torch.nan, 1.0], [0.0, 1.0], False),
        ([0.0, -torch.inf, 0.0], [0.0, -torch.inf, 0.0], True),
        ([-torch.inf, 1000.5], [-torch.inf, 1000.0], True),  # except for rounding
        ([-torch.inf, 1002.0], [-torch.inf, 1000.0], False),
    ],
)
def test_infinities_are_compared_and_hide_no_other_difference(a, b, equal) -> None:
    assert _close(torch.tensor(a), torch.tensor(b)) is equal
