"""Base class of components: the terms of the sum that represents a compressed weight.

A component stores one matrix in some compressed layout. Its class defines the tensors of the
layout, their sizes, the multiplication, the invariants that loading checks, and how tensors are
encoded.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrc.compressors.io.finite import all_finite
from lrc.compressors.kernels import one_row
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import read_values
from lrc.compressors.layers.quantization_args import QuantizationArgs, TensorSpecs
from lrc.compressors.layers.recomputed import product
from lrc.compressors.layers.shared_input import SharedInput

Device = torch.device | str | None
Sizes = Mapping[str, int]
"""Integers that determine the shapes of stored tensors, such as ``{"rank": 12}``."""


@dataclass(frozen=True)
class ComponentConfig:
    """Configuration of one component, as plans, config.json and reports store it."""

    type: str
    """Key of `COMPONENTS`."""
    sizes: Sizes
    """One integer for every name in the component's `SIZES`."""
    quantization: QuantizationArgs | None = None
    """Quantization of matrices and values; None stores them in the dtype of the model."""
    pattern: str | None = None
    """``2:4`` if exactly two of every four consecutive entries are stored; of a chain of cores the
    factors of the dimensions, see `ChainShape`; None if unstructured."""
    shares: str | None = None
    """Name of the layer that stores the shared first factor; None if this one has its own."""
    ranks: tuple[int, ...] = ()
    """Ranks that the component can be cut to, one for every budget of an elastic checkpoint, from
    the stored one on, 0 where a budget lacks the component; empty if it has no other budgets."""

    def with_rank(self, rank: int) -> "ComponentConfig":
        """Return the same configuration with another rank, which limits those of all budgets."""
        ranks = tuple(min(each, rank) for each in self.ranks)
        return replace(self, sizes={**self.sizes, "rank": rank}, ranks=ranks)

    def at_budget(self, index: int) -> "ComponentConfig":
        """Return the configuration after a cut to one of the budgets, which are counted from 0."""
        return replace(self.with_rank(self.ranks[index]), ranks=()) if self.ranks else self

    def with_quantization(self, args: QuantizationArgs | None) -> "ComponentConfig":
        """Return the same configuration with other quantization parameters."""
        return replace(self, quantization=args)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; sizes are keys next to the type."""
        record: dict[str, Any] = {"type": self.type, **self.sizes}
        if self.quantization is not None:
            record["quantization"] = str(self.quantization)
        if self.pattern is not None:
            record["pattern"] = self.pattern
        if self.shares is not None:
            record["shares"] = self.shares
        if self.ranks:
            record["ranks"] = list(self.ranks)
        return record


class Component(nn.Module, ABC):
    """One term of the sum that approximates a weight; ``forward`` multiplies by it.

    Sizes are computed by class methods, so that planning and validation need no module instance.
    Tensors called ``NAME.weight`` become children: `nn.Linear`, so that PEFT adapters can target
    them, or `PackedLinear` if quantized. Of the others, tensors with a fixed dtype (masks, indices,
    packed integers) become buffers, the rest parameters. `stored_values` reads the tensor called
    ``values``.

    Parameters
    ----------
    shape : tuple of int
        ``(d_out, d_in)`` of the weight.
    config : ComponentConfig
    device, dtype : optional
        As for `nn.Linear`. Tensors are uninitialized.
    """

    TYPE: ClassVar[str]
    """Name in plans and configurations."""
    SIZES: ClassVar[tuple[str, ...]] = ()
    """Keys of `ComponentConfig.sizes`, in the order in which tables show them."""
    PATTERNS: ClassVar[tuple[str, ...]] = ()
    """Values of `ComponentConfig.pattern` that the layout supports, see `allows`."""
    COARSE: ClassVar[bool] = False
    """Whether there are so few sizes that an allocation considers all of them, and that a uniform
    budget is met only by giving some weights the next one."""
    SHARED_SIZE: ClassVar[str | None] = None
    """Name of the size that all layers sharing a first factor (the matrix applied to the input)
    have in common; None if the component cannot share a factor."""

    siblings: SharedInput | None = None
    """Components of other layers with the same input, with which products are computed."""
    position: int = 0
    """Position among them."""
    tile: int | None = None
    """Largest number of tokens to multiply by factors at once, see `stream_low_rank`."""

    def __init__(
        self,
        shape: tuple[int, int],
        config: ComponentConfig,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_out, self.d_in = shape
        self.config = config
        specs = self.tensors(*shape, config)
        self._values_shape = torch.Size(specs["values"].shape if "values" in specs else ())
        for name, spec in specs.items():
            leaf = name.removesuffix(".weight")
            if leaf != name:
                self.add_module(leaf, _empty_linear(spec.shape, config, device, dtype))
                continue
            stored = {name: spec}
            if config.quantization is not None:
                stored = config.quantization.quantized_specs(stored)
            for key, (stored_shape, stored_dtype, _) in stored.items():
                tensor = torch.empty(stored_shape, dtype=stored_dtype or dtype, device=device)
                if stored_dtype is None:
                    self.register_parameter(key, nn.Parameter(tensor))
                else:
                    self.register_buffer(key, tensor)

    @classmethod
    @abstractmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return the shape and dtype of every tensor, before quantization.

        Raises
        ------
        ValueError
            If no weight of that shape can have this configuration.
        """

    @classmethod
    def sizes_at(
        cls, step: int, d_out: int, d_in: int, *, ratio: float = 2.0, pattern: str | None = None
    ) -> Sizes:
        """Return the sizes of the `step`-th smallest configuration, counted from 1.

        The default is for components with one size: it equals `step`.

        Parameters
        ----------
        ratio : float
            First size divided by the last one, for components with two sizes.
        pattern : str, optional
            Return the sizes nearest to those of `step` that this pattern allows.

        Raises
        ------
        ValueError
            If no weight of that shape can have the pattern.
        """
        return dict.fromkeys(cls.SIZES, step)

    @classmethod
    def allows(cls, pattern: str | None) -> bool:
        """Return whether weights of some shape can have the pattern."""
        return pattern in (None, *cls.PATTERNS)

    @classmethod
    def largest_step(cls, d_out: int, d_in: int, *, pattern: str | None = None) -> int:
        """Return the largest step of `sizes_at`, by default the largest rank; 0 if none exists.

        Raises
        ------
        ValueError
            If the sizes depend on the pattern, and no weight of that shape can have it.
        """
        return min(d_out, d_in)

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, config: ComponentConfig) -> int:
        """Return the multiply-adds per token, by default those of the dense product."""
        return d_out * d_in

    @classmethod
    def describe(cls, d_out: int, d_in: int, config: ComponentConfig) -> str:
        """Return the sizes as tables show them."""
        return ", ".join(f"{name} {config.sizes[name]}" for name in cls.SIZES)

    @staticmethod
    @abstractmethod
    def encode(**parts: Tensor) -> dict[str, Tensor]:
        """Convert the result of a solver to unquantized tensors, named as in `tensors`.

        The keywords depend on the component type, see the subclasses.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out], by default with the materialized matrix."""
        return product(x, self.matrix, self)

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the matrix [d_out, d_in] of this component."""

    def multiply_a(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., d_in] by the child ``a``, together with its siblings."""
        p = None if self.siblings is None else self.siblings.multiply(self.position, x)
        if p is None:
            p = multiply(self.get_submodule("a"), x)
        return p

    def prepare(self) -> None:
        """Find out whether the devices of the factors run the kernel for one row."""
        for child in self._modules.values():
            if type(child) is nn.Linear:
                one_row.prepare(child.weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert all tensors, for `to`, `half` and the like."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.prepare()
        if self.siblings is not None:
            self.siblings.follow()
        return self

    def problems(self) -> list[str]:
        """Return violated invariants of the loaded tensors, such as indices out of range."""
        found = []
        for name, tensor in self.named_parameters():
            found += [f"{name} {text}" for text in finite_problems(tensor)]
            # A stored scale is never zero. float16 is excluded, because small bfloat16 scales
            # underflow to zero when loaded in it.
            if name.endswith("_scale") and tensor.dtype != torch.float16 and not tensor.all():
                found.append(f"{name} contains zeros")
        buffers = dict(self.named_buffers())
        for name, spec in self.tensors(self.d_out, self.d_in, self.config).items():
            shape = buffers.get(f"{name}_shape")
            if shape is not None and shape.tolist() != spec.shape:
                found.append(f"{name}_shape must be {spec.shape}, got {shape.tolist()}")
        return found

    def stored_values(self) -> Tensor:
        """Return the tensor ``values``, dequantized."""
        args, shape = self.config.quantization, self._values_shape
        if args is None:
            # Not `get_parameter`: training may put values in its place that it has computed.
            values = self._parameters["values"]
            assert values is not None
            return values
        packed, scale = self.get_buffer("values_packed"), self.get_parameter("values_scale")
        return read_values(packed, scale, shape.numel(), args).view(shape)

    def extra_repr(self) -> str:
        """Return the configuration for `print(model)`."""
        sizes = "".join(f", {name}={self.config.sizes[name]}" for name in self.SIZES)
        args = "" if self.config.quantization is None else f", {self.config.quantization}"
        return f"{self.d_in}, {self.d_out}{sizes}{args}"


class SharedFactorComponent(Component):
    """A component whose first factor, the matrix ``a`` applied to the input, can be shared.

    The first layer of a group stores ``a``. The others name that layer in `ComponentConfig.shares`
    and read its ``a`` in every forward call, so that an adapter attached to it applies to all.
    """

    owner: "SharedFactorComponent | None" = None
    shared = False
    """Whether other layers use the factor of this one."""

    def use_factor_of(self, owner: "SharedFactorComponent") -> None:
        """Use the factor ``a`` of `owner` from now on.

        Raises
        ------
        ValueError
            If `owner` has another type or another shape of ``a``.
        """
        assert self.SHARED_SIZE is not None
        ours, theirs = (
            (type(one), one.config.sizes.get(self.SHARED_SIZE), one.d_in, one.config.quantization)
            for one in (self, owner)
        )
        if ours != theirs or owner.config.shares is not None:
            raise ValueError(
                f"the layer that stores the shared factor must be {self.TYPE} with "
                f"{self.SHARED_SIZE} {ours[1]}, {ours[2]} inputs and quantization {ours[3]}, got "
                f"{owner.config} with {owner.d_in} inputs"
            )
        # Not registered: it would appear once per layer in state_dict() and named_modules().
        object.__setattr__(self, "owner", owner)
        owner.shared = True

    @property
    def first(self) -> Any:
        """The module of ``a``: that of this layer or of `owner`."""
        return (self if self.owner is None else self.owner).get_submodule("a")

    def first_matrix(self, like: Tensor) -> Tensor:
        """Return the matrix of ``a`` on the device and in the dtype of `like`."""
        matrix: Tensor = self.first.weight.to(like.device, like.dtype)
        return matrix

    def multiply_first(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., d_in] by ``a``."""
        return self.multiply_a(x) if self.owner is None else self.multiply_first_alone(x)

    def multiply_first_alone(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., d_in] by ``a``, without the layers of `stack`."""
        a = self.first
        if self.owner is None:
            return multiply(a, x)
        # A device map may place the owner elsewhere. Hooks of accelerate bring offloaded (meta)
        # weights to the device of the input.
        device = next(a.parameters()).device
        p: Tensor = a(x if device.type == "meta" else x.to(device))
        return p.to(x.device)


def _empty_linear(
    shape: list[int], config: ComponentConfig, device: Device, dtype: torch.dtype | None
) -> nn.Linear | PackedLinear:
    """Return a linear layer without bias whose weight is uninitialized."""
    rows, columns = shape
    if config.quantization is not None:
        return PackedLinear(columns, rows, config.quantization, device=device, dtype=dtype)
    linear: nn.Linear = nn.utils.skip_init(
        nn.Linear, columns, rows, bias=False, device=device or "cpu", dtype=dtype
    )
    return linear


def multiply(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module(x)`` for a factor, with a faster kernel for one row on a CUDA device."""
    if type(module) is nn.Linear and is_plain(module):
        return one_row.linear(x, module.weight)
    y: Tensor = module(x)
    return y


def is_plain(module: nn.Module) -> bool:
    """Return whether calling a child is multiplying by its weight: no adapter, hook or offload."""
    if type(module) not in (nn.Linear, PackedLinear):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not hooked and not any(
        weight.is_meta for weight in module._parameters.values() if weight is not None
    )


def check_range(name: str, value: int, largest: int, d_out: int, d_in: int) -> None:
    """Raise ValueError if a size is not in ``[1, largest]``."""
    if not 1 <= value <= largest:
        raise ValueError(f"{name} must be in [1, {largest}] for [{d_out}, {d_in}], got {value}")


def finite_problems(tensor: Tensor) -> list[str]:
    """Return one problem if a tensor contains infinities or NaN, else an empty list.

    The dtype is named, because large numbers of bfloat16 overflow when loaded in float16.
    """
    if all_finite(tensor):
        return []
    return [f"is not finite in {str(tensor.dtype).removeprefix('torch.')}"]
