"""Find the MLPs and attention heads of a model that can be narrowed."""

import math
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrc.compressors.layers.experts import split_experts_
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.rope import frequencies

# The linears whose outputs form the channels of an MLP, and the linear that reads them.
MLPS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim")
ATTENTIONS = tuple(("q_proj", "k_proj", "v_proj", o) for o in ("o_proj", "out_proj", "dense"))


@dataclass(frozen=True)
class Mlp:
    """The linears of an MLP, by full names."""

    inputs: tuple[str, ...]
    output: str


class Attention(NamedTuple):
    """The linears of an attention module, by full names."""

    q: str
    k: str
    v: str
    o: str

    @property
    def module(self) -> str:
        """Full name of the attention module."""
        return self.q.rpartition(".")[0]


@dataclass(frozen=True)
class Heads:
    """The attention modules of a model and their common sizes."""

    attentions: list[Attention]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    frequencies: Tensor
    """Inverse frequencies, [head_dim / 2]."""
    scale: float
    """Factor of cos and sin."""


@dataclass(frozen=True)
class Layout:
    """The parts of a model that can be narrowed."""

    architecture: Architecture
    mlps: list[Mlp]
    """One per layer."""
    width_key: str
    """Config key of the MLP width."""
    width: int
    heads: Heads | str
    """The heads, or a clause that gives the reason why they cannot be narrowed."""

    def linear_shapes(
        self, widths: Sequence[int], head_dim: int | None = None
    ) -> dict[str, list[int]]:
        """Return the weight shapes of MLPs of `widths`, one per layer, and heads of `head_dim`.

        Linears that do not change are left out; heads do not change if `head_dim` is None.
        """
        of = self.architecture.model.get_submodule
        found: dict[str, list[int]] = {}
        for mlp, width in zip(self.mlps, widths, strict=True):
            if width != self.width:
                found |= {name: [width, of(name).in_features] for name in mlp.inputs}
                found[mlp.output] = [of(mlp.output).out_features, width]
        if head_dim is not None and isinstance(self.heads, Heads):
            wide, narrow = self.heads.n_heads * head_dim, self.heads.n_kv_heads * head_dim
            for q, k, v, o in self.heads.attentions:
                found |= {name: [narrow, of(name).in_features] for name in (k, v)}
                found |= {q: [wide, of(q).in_features], o: [of(o).out_features, wide]}
        return found

    def shapes(self, width: int, head_dim: int | None) -> dict[str, list[int]]:
        """Return the shapes of all stored parameters with MLPs of one width."""
        stored = self.architecture.stored_parameters()
        shapes = {name: list(p.shape) for name, p in stored.items()}
        for name, shape in self.linear_shapes([width] * len(self.mlps), head_dim).items():
            shapes[f"{name}.weight"] = shape
            if f"{name}.bias" in shapes:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def bytes(self, width: int, head_dim: int | None) -> int:
        """Return the size of the tensors of these shapes."""
        stored = self.architecture.stored_parameters()
        shapes = self.shapes(width, head_dim)
        return sum(math.prod(shape) * stored[name].itemsize for name, shape in shapes.items())

    def fits(self, config: PreTrainedConfig, width: int, head_dim: int | None) -> bool:
        """Return whether a model of this config has these shapes: some classes ignore keys."""
        try:
            state = skeleton(self.architecture, config).state_dict(keep_vars=True)
        except Exception:  # modeling code may raise anything for unexpected sizes
            return False
        shapes = self.shapes(width, head_dim)
        return all(n in state and list(state[n].shape) == shape for n, shape in shapes.items())


def find_layout(architecture: Architecture) -> Layout | str:
    """Return what can be narrowed, or a clause that gives the reason why MLPs cannot be."""
    found = _find_linears(architecture, MLPS)
    if isinstance(found, str):
        return found
    mlps = [Mlp(tuple(inputs), output) for *inputs, output in found]
    widths = {architecture.model.get_submodule(mlp.output).in_features for mlp in mlps}
    if len(widths) > 1:
        return f"its MLPs differ in width ({min(widths)} to {max(widths)})"
    width = widths.pop()
    config = architecture.model.config
    keys = [key for key in WIDTH_KEYS if getattr(config, key, None) == width]
    if not keys:
        return f"none of {', '.join(WIDTH_KEYS)} in its config equals the width {width}"
    return Layout(architecture, mlps, keys[0], width, _find_heads(architecture))


def skeleton(architecture: Architecture, config: PreTrainedConfig) -> Any:
    """Build a model of the same class with another config, without weights."""
    with init_empty_weights(include_buffers=False):
        model = type(architecture.model)(deepcopy(config))
    split_experts_(model)
    return model


def _find_linears(
    architecture: Architecture, kinds: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]] | str:
    """Return the full names of the linears of the only module in each layer that is of some kinds.

    A kind consists of the names of a module's linears. If a layer has no or several such modules,
    return a clause that says so.
    """
    result = []
    for name, layer in zip(architecture.layer_names, architecture.layers, strict=True):
        found = [
            tuple(f"{path}.{linear}" for linear in kind)
            for path, module in layer.named_modules(prefix=name)
            for kind in kinds
            if all(isinstance(getattr(module, linear, None), nn.Linear) for linear in kind)
        ]
        if len(found) != 1:
            written = ", ".join("/".join(kind) for kind in kinds)
            return f"{name} has {len(found)} modules with the linears {written}, not one"
        result += found
    return result


def _find_heads(architecture: Architecture) -> Heads | str:
    config = architecture.model.config
    table = frequencies(architecture.model, config)
    if isinstance(table, str):
        return table
    found = _find_linears(architecture, ATTENTIONS)
    if isinstance(found, str):
        return found
    attentions = [Attention(*names) for names in found]
    inverse, scale = table
    head_dim, n_heads = 2 * len(inverse), int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    for attention in attentions:
        reason = _unsupported(architecture.model, attention, (n_heads, n_kv_heads, head_dim))
        if reason:
            return f"{attention.module} {reason}"
    return Heads(attentions, n_heads, n_kv_heads, head_dim, inverse, scale)


def _unsupported(model: nn.Module, attention: Attention, sizes: tuple[int, int, int]) -> str | None:
    """Return the reason why the heads of an attention module cannot be narrowed, if any."""
    n_heads, n_kv_heads, head_dim = sizes
    module: Any = model.get_submodule(attention.module)
    linears: list[Any] = [model.get_submodule(name) for name in attention]
    own = {id(p) for linear in linears for p in linear.parameters()}
    others = [name for name, p in module.named_parameters() if id(p) not in own]
    if others:
        return f"holds {others[0]}, which acts on whole heads"
    q, k, v, o = (linear.weight.shape for linear in linears)
    wide, narrow = n_heads * head_dim, n_kv_heads * head_dim
    if [q[0], k[0], v[0], o[1]] != [wide, narrow, narrow, wide]:
        return "does not have the heads of the config"
    if not isinstance(getattr(module, "scaling", None), float):
        return "does not have the factor of its scores as 'scaling'"
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    if rotate is None or rotate(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return "pairs the dimensions of its rotary embedding in another way"
    return None
