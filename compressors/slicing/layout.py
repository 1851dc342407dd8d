"""Where a model has channels that can go: MLPs and heads, found from modules and held to config."""

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.rope import frequencies

# The linears that make an MLP's channels, and the one that reads them.
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim")
OUTPUTS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class Mlp:
    """An MLP, by the full names of its linears."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Attention:
    """An attention, by the full names of its linears."""

    q: str
    k: str
    v: str
    o: str

    @property
    def module(self) -> str:
        """Full name of the module that owns them."""
        return self.q.rpartition(".")[0]


@dataclass(frozen=True)
class Heads:
    """What all attentions of a model share."""

    attentions: list[Attention]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    frequencies: Tensor
    """Inverse, [head_dim / 2]."""
    scale: float
    """Of cos and sin."""


@dataclass(frozen=True)
class Layout:
    """What can be narrowed in a model."""

    mlps: list[Mlp]
    """One a layer."""
    width_key: str
    width: int
    heads: Heads | str
    """Or why they stay as they are: a clause."""


def find_layout(architecture: Architecture) -> Layout | str:
    """Find what can be narrowed; or return the reason, a clause, why MLPs cannot be."""
    mlps = []
    for name, layer in zip(architecture.layer_names, architecture.layers, strict=True):
        found = _mlps(name, layer)
        if len(found) != 1:
            kinds = ", ".join("/".join((*inputs, output)) for inputs, output in MLPS)
            return f"{name} holds {len(found)} MLPs of the kinds {kinds}, not one"
        mlps += found
    widths = {architecture.model.get_submodule(mlp.output).in_features for mlp in mlps}
    if len(widths) > 1:
        return f"its MLPs are not all of one width ({min(widths)} to {max(widths)})"
    width = widths.pop()
    config = architecture.model.config
    keys = [key for key in WIDTH_KEYS if getattr(config, key, None) == width]
    if not keys:
        return f"its config has none of {', '.join(WIDTH_KEYS)} that says the width {width}"
    return Layout(mlps, keys[0], width, _heads(architecture))


def mlp_shapes(
    architecture: Architecture, layout: Layout, widths: Sequence[int]
) -> dict[str, list[int]]:
    """Return the shapes of the linears of those MLPs that `widths`, one a layer, make narrower."""
    found = {}
    for mlp, width in zip(layout.mlps, widths, strict=True):
        if width == layout.width:
            continue
        for name in mlp.inputs:
            found[name] = [width, architecture.model.get_submodule(name).in_features]
        found[mlp.output] = [architecture.model.get_submodule(mlp.output).out_features, width]
    return found


def narrowed_shapes(
    architecture: Architecture, layout: Layout, width: int, head_dim: int | None
) -> dict[str, list[int]]:
    """Return the shapes of all stored parameters with MLPs of `width` and heads of `head_dim`."""
    shapes = {name: list(p.shape) for name, p in architecture.stored_parameters().items()}

    def narrow(linear: str, axis: int, size: int) -> None:
        shapes[f"{linear}.weight"][axis] = size
        if axis == 0 and f"{linear}.bias" in shapes:
            shapes[f"{linear}.bias"][0] = size

    for mlp in layout.mlps:
        for name in mlp.inputs:
            narrow(name, 0, width)
        narrow(mlp.output, 1, width)
    if head_dim is not None and isinstance(layout.heads, Heads):
        for attention in layout.heads.attentions:
            narrow(attention.q, 0, layout.heads.n_heads * head_dim)
            narrow(attention.k, 0, layout.heads.n_kv_heads * head_dim)
            narrow(attention.v, 0, layout.heads.n_kv_heads * head_dim)
            narrow(attention.o, 1, layout.heads.n_heads * head_dim)
    return shapes


def skeleton(architecture: Architecture, config: PreTrainedConfig) -> Any:
    """Build the model of another config of the same class, without weights."""
    with init_empty_weights(include_buffers=False):
        return type(architecture.model)(deepcopy(config))


def obeys(
    architecture: Architecture, config: PreTrainedConfig, shapes: Mapping[str, list[int]]
) -> bool:
    """Say whether a model of the config has these parameters: not all read what a config says."""
    try:
        state = skeleton(architecture, config).state_dict(keep_vars=True)
    except Exception:  # modeling code raises anything about sizes it did not expect
        return False
    return all(n in state and list(state[n].shape) == shape for n, shape in shapes.items())


def _mlps(layer_name: str, layer: nn.Module) -> list[Mlp]:
    result = []
    for name, module in layer.named_modules(prefix=layer_name):
        linears = {n for n, child in module.named_children() if isinstance(child, nn.Linear)}
        result += [
            Mlp(tuple(f"{name}.{n}" for n in inputs), f"{name}.{output}")
            for inputs, output in MLPS
            if {*inputs, output} <= linears
        ]
    return result


def _heads(architecture: Architecture) -> Heads | str:
    config = architecture.model.config
    table = frequencies(architecture.model, config)
    if isinstance(table, str):
        return table
    attentions = []
    for name, layer in zip(architecture.layer_names, architecture.layers, strict=True):
        found = _attentions(name, layer)
        if len(found) != 1:
            return f"{name} has no attention of four linears q_proj, k_proj, v_proj and an output"
        attentions += found
    inverse, scale = table
    head_dim, n_heads = 2 * len(inverse), int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    for attention in attentions:
        reason = _unfit(architecture.model, attention, (n_heads, n_kv_heads, head_dim))
        if reason:
            return f"{attention.module} {reason}"
    return Heads(attentions, n_heads, n_kv_heads, head_dim, inverse, scale)


def _attentions(layer_name: str, layer: nn.Module) -> list[Attention]:
    result = []
    for name, module in layer.named_modules(prefix=layer_name):
        linears = {n for n, child in module.named_children() if isinstance(child, nn.Linear)}
        outputs = [n for n in OUTPUTS if n in linears]
        if {"q_proj", "k_proj", "v_proj"} <= linears and len(outputs) == 1:
            names = ("q_proj", "k_proj", "v_proj", outputs[0])
            result.append(Attention(*(f"{name}.{n}" for n in names)))
    return result


def _unfit(model: nn.Module, attention: Attention, sizes: tuple[int, int, int]) -> str | None:
    """Say why the heads of an attention cannot be narrowed; None if they can."""
    n_heads, n_kv_heads, head_dim = sizes
    module: Any = model.get_submodule(attention.module)
    linears: list[Any] = [
        model.get_submodule(n) for n in (attention.q, attention.k, attention.v, attention.o)
    ]
    own = {id(p) for linear in linears for p in linear.parameters()}
    others = [name for name, p in module.named_parameters() if id(p) not in own]
    if others:
        return f"holds {others[0]}, which acts on whole heads"
    q, k, v, o = (linear.weight.shape for linear in linears)
    wide, narrow = n_heads * head_dim, n_kv_heads * head_dim
    if [q[0], k[0], v[0], o[1]] != [wide, narrow, narrow, wide]:
        return "does not have the heads that the config says"
    if not isinstance(getattr(module, "scaling", None), float):
        return "does not say by what it scales scores"
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    if rotate is None or rotate(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return "pairs the dimensions of its rotary embedding in another way"
    return None
