"""The layer that takes the place of a compressed linear layer."""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.component import (
    Component,
    ComponentConfig,
    Device,
    SharedFactorComponent,
    finite_problems,
)
from lrc.compressors.layers.config import COMPONENTS, WeightConfig
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs

SENTINEL = {"weight": TensorSpec([1], torch.uint8)}


def sentinel() -> Tensor:
    """Return the byte that is stored under the name of the dense weight."""
    return torch.zeros(1, dtype=torch.uint8)


class CompressedLinear(nn.Module):
    """Compute ``y = x @ W_hat.T + bias`` where ``W_hat`` is a sum of components.

    Components are children named after their type, such as ``q_proj.low_rank``. The buffer `weight`
    is a sentinel of one byte under the name of the dense weight: a loader that does not know lrc
    meets a shape mismatch and stops, where it would otherwise start from random weights with only a
    warning.

    Parameters
    ----------
    config : WeightConfig
    bias : bool
        Whether the layer has a bias.
    device, dtype : optional
        As for `nn.Linear`. Tensors are uninitialized.
    """

    REPLACES: type[nn.Module] = nn.Linear
    weight: Any

    def __init__(
        self,
        config: WeightConfig,
        *,
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.out_features, self.in_features = config.shape
        self._buffers["weight"] = torch.zeros(1, dtype=torch.uint8, device=device)
        for c in config.components:
            made = COMPONENTS[c.type](config.shape, c, device=device, dtype=dtype)
            self.add_module(c.type, made)
        d_out = self.out_features
        self.bias = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None

    @classmethod
    def replacing(cls, dense: Any, config: WeightConfig) -> "CompressedLinear":
        """Return the layer that replaces `dense`, on its device and in its dtype."""
        bias = getattr(dense, "bias", None) is not None or config.bias
        return cls(config, bias=bias, device=dense.weight.device, dtype=dense.weight.dtype)

    @property
    def components(self) -> list[Component]:
        """The terms of the sum, in the order of the configuration."""
        return [child for child in self.children() if isinstance(child, Component)]

    def connect(self, model: nn.Module) -> None:
        """Find the layers of `model` whose factors this one shares.

        Raises
        ------
        ValueError
            If there is no such layer, or its factor has another shape.
        """
        for component in self.components:
            name = component.config.shares
            if name is None:
                continue
            try:
                owner = model.get_submodule(f"{name}.{component.TYPE}")
            except AttributeError:
                owner = None
            if not isinstance(owner, SharedFactorComponent) or not isinstance(
                component, SharedFactorComponent
            ):
                raise ValueError(f"shares a factor with {name}, which has no {component.TYPE}")
            component.use_factor_of(owner)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        children: dict[str, Any] = self._modules  # `getattr` and `children` are slow
        first, *others = self.config.components
        y: Tensor = children[first.type](x)
        for term in others:
            y = y + children[term.type](x)
        return y if self.bias is None else y + self.bias

    def cut_(self, index: int) -> None:
        """Cut components with several budgets to one of these, which are counted from 0."""
        self.config = self.config.at_budget(index)
        for component in self.components:
            if isinstance(component, LowRank) and (ranks := component.config.ranks):
                if ranks[index] == 0:
                    del self._modules[component.TYPE]
                else:
                    component.cut_(index)

    def dense_weight(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float32."""
        first, *others = (component.matrix().float() for component in self.components)
        return sum(others, start=first)

    def to_dense(self) -> nn.Linear:
        """Return the ordinary linear layer that computes the same function."""
        like = next(self.parameters())
        linear: nn.Linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    @torch.no_grad()
    def plus_low_rank(
        self, B: Tensor, A: Tensor, *, bias: Tensor | None = None
    ) -> "CompressedLinear":
        """Return a layer with the product ``B @ A`` added to its weight; this one is unchanged.

        The product becomes a `low_rank` component, or columns and rows of the one that the layer
        has. The tensors of all other components belong to both layers.

        Parameters
        ----------
        B : Tensor, shape [d_out, rank]
        A : Tensor, shape [rank, d_in]
        bias : Tensor, shape [d_out], optional
            Added to the bias of the layer.

        Raises
        ------
        ValueError
            If the layer has a `low_rank` component that is quantized or shared with other layers.
        """
        like = next(self.parameters())
        old: Any = self._modules.get(LowRank.TYPE)
        if old is not None:
            if old.config.quantization is not None or old.shared or old.owner is not None:
                kind = "quantized" if old.config.quantization is not None else "shared"
                raise ValueError(
                    f"the low-rank factors of the layer are {kind}, and cannot get more columns"
                )
            B = torch.cat([old.b.weight, B.to(like)], dim=1)
            A = torch.cat([old.a.weight, A.to(like)])
            if old.siblings is not None:
                old.siblings.dissolve()
        config = ComponentConfig(LowRank.TYPE, {"rank": len(A)})
        added = LowRank(self.config.shape, config, device=like.device, dtype=like.dtype)
        added.load_state_dict({"a.weight": A, "b.weight": B})
        added.requires_grad_(like.requires_grad)
        layer = copy(self)
        layer._modules = {**self._modules, LowRank.TYPE: added}
        layer._parameters = dict(self._parameters)
        if bias is not None:
            whole = bias.to(like) if self.bias is None else self.bias + bias
            layer.bias = nn.Parameter(whole, requires_grad=like.requires_grad)
        layer.config = replace(
            self.config,
            components=tuple(c.config for c in layer.components),
            bias=self.config.bias or (self.bias is None and bias is not None),
        )
        return layer

    def problems(self) -> list[str]:
        """Return violated invariants of the loaded tensors."""
        found = [f"{c.TYPE}: {text}" for c in self.components for text in c.problems()]
        if self.weight.any():
            found.append("weight must be the sentinel 0")
        if self.bias is not None:
            found += [f"bias {text}" for text in finite_problems(self.bias)]
        return found

    def extra_repr(self) -> str:
        """Return the shape for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Linear(CompressedLinear):
    """A compressed layer whose `weight` is an int8 tensor for those who ask.

    The models for which `compares_dtype` holds convert the inputs of a layer to the dtype of its
    weight, unless that is int8, which they take for a quantized one.
    """

    @property
    def weight(self) -> Any:
        """The sentinel [1], as int8."""
        stored: Any = self._buffers["weight"]
        view: Any = stored.view(torch.int8)
        # transformers marks tensors that it has loaded, and initializes the others.
        view._is_hf_initialized = getattr(stored, "_is_hf_initialized", False)
        return view


def compares_dtype(kind: Any, leaf: str) -> bool:
    """Return whether the code of a class asks if the weight of its child `leaf` is int8.

    T5 and its relatives do.
    """
    return f".{leaf}.weight.dtype != torch.int8" in _code_of(kind)


@lru_cache
def _code_of(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # defined where no file is
        return ""


def convert_inputs_(model: Any) -> None:
    """Convert the inputs of compressed layers that are in float32 in a model of 16 bits.

    Some classes, such as T5, keep layers in float32 if a model is loaded in float16, where their
    outputs could overflow.
    """
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or [])}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear) and kept & {*name.split(".")}:
            tensors = [*module.parameters(), *module.buffers()]
            if model.dtype != torch.float32 and torch.float32 in {x.dtype for x in tensors}:
                module.register_forward_pre_hook(_to_float32)


def _to_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() for x in args)


def layer_tensors(config: WeightConfig, *, bias: bool = False) -> TensorSpecs:
    """Return all stored tensors of a compressed layer by their names within it.

    Raises
    ------
    ValueError
        If no weight of that shape can have this configuration.
    """
    own = {"bias": TensorSpec([config.shape[0]])} if bias or config.bias else {}
    return {**SENTINEL, **config.tensors(), **own}


@torch.no_grad()
def reconstruct(
    config: WeightConfig,
    read: Callable[[str], Tensor],
    read_shared: Callable[[str], Tensor] | None = None,
) -> Tensor:
    """Return the weight [d_out, d_in] in float32 that stored tensors represent.

    Parameters
    ----------
    config : WeightConfig
        With at least one component.
    read : callable
        Returns a tensor by its name within the layer, for example ``low_rank.a.weight``.
    read_shared : callable, optional
        The same for the layer whose factor is shared, if one is.
    """
    own = config.tensors()
    whole = replace(
        config, components=tuple(replace(c, shares=None) for c in config.components), bias=False
    )
    tensors: dict[str, Tensor] = {}
    for name in whole.tensors():
        if name in own:
            tensors[name] = read(name)
        else:
            assert read_shared is not None
            tensors[name] = read_shared(name)
    like = next(t for t in tensors.values() if t.is_floating_point())
    layer = CompressedLinear(whole, device=like.device, dtype=like.dtype)
    layer.load_state_dict({**tensors, "weight": sentinel()})
    return layer.dense_weight()
