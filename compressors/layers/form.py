"""What every run-time form of a compressed linear layer answers, and what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lrc.compressors.layers.packed import PackedMatrix, read_values
from lrc.compressors.layers.parts import Device, empty_linear
from lrc.compressors.layers.scheme import Leaves, Scheme

Spec = Mapping[str, Any]
"""A module's entry in config.json, such as ``{"form": "low_rank", "rank": 12}``."""
Sizes = Mapping[str, int]
"""The whole numbers of a spec that tell, with the shape, what a form stores: ``{"rank": 12}``."""
Shapes = Leaves


class Form(nn.Module, ABC):
    """A linear layer ``y = x @ W_hat.T + bias`` that stores something else than ``W_hat``.

    What is a question of sizes alone is answered by the class, so that plans and checks need no
    module. Parameters are plain `nn.Linear` children where they can be, for adapters and weight
    quantizers to find. `weight` is a sentinel of one byte under the name of the dense weight: a
    loader that does not know the form meets a shape mismatch and stops, where it would otherwise
    start from random weights with no more than a warning.

    A spec holds ``form``, the form's `SIZES` and what else it adds. With ``"bias": true`` the layer
    has a bias that the method made and that is stored with the module; without, the bias is that of
    the dense layer, if it had one. With ``"pattern": "2:4"`` exactly two of every four consecutive
    entries are stored, where a form of `PATTERNS` has them; nothing else about it changes. With
    ``"scheme": "int4-g64"`` its matrices and values are stored as integers, see `Scheme`; then
    ``"shape": [d_out, d_in]`` tells what packed tensors do not.

    Parameters
    ----------
    d_in, d_out : int
    bias : bool
        Whether the layer has a bias.
    scheme : str, optional
        How its numbers are stored as integers.
    device, dtype : optional
        As for `nn.Linear`. Weights are left uninitialised.
    **sizes : int
        One for every name in `SIZES`.
    """

    SIZES: ClassVar[tuple[str, ...]]
    """Names of the sizes, which are attributes of a module too."""
    encode: ClassVar[Callable[..., dict[str, Tensor]]]
    """Writes the parts that a method has found (which, its docstring says) as the tensors of the
    file, by the names of `shapes`, but for a bias. Those without a dtype there are unrounded:
    rounding them to the model's is for the caller."""
    BIAS: ClassVar[str]
    """Name of the bias within the module."""
    REPLACES: ClassVar[type[nn.Module]] = nn.Linear
    """The module whose place it takes; its weight is [d_out, d_in]."""
    RATIOS: ClassVar[tuple[float, ...]] = ()
    """Ratios of the sizes that an allocation looks at, where the recipe has no say in them."""
    PATTERNS: ClassVar[tuple[str, ...]] = ()
    """What a spec may claim as its ``pattern``."""

    in_features: int
    out_features: int
    weight: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool,
        scheme: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.scheme = None if scheme is None else Scheme.read(scheme)
        for name in self.SIZES:
            setattr(self, name, sizes[name])
        self.register_buffer("weight", torch.zeros(1, dtype=torch.uint8, device=device))
        self._build(bias=bias, device=device, dtype=dtype)
        if self.scheme is not None:
            self._pack(self.scheme, device=device, dtype=dtype)

    @abstractmethod
    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        """Make the parts, uninitialised; all sizes are set."""

    def _pack(self, scheme: Scheme, *, device: Device, dtype: torch.dtype | None) -> None:
        """Let the matrices and values that `_build` has made be integers, uninitialised."""
        for name, child in list(self.named_children()):
            if isinstance(child, nn.Linear):
                packed = PackedMatrix(
                    child.out_features,
                    child.in_features,
                    scheme,
                    bias=child.bias is not None,
                    device=device,
                    dtype=dtype,
                )
                setattr(self, name, packed)
        values = self._parameters.pop("values", None)
        if values is None:
            return
        self._values_shape = values.shape
        for name, (shape, kind) in scheme.values("values", [*values.shape]).items():
            tensor = torch.empty(shape, dtype=kind or dtype, device=device)
            if kind is None:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def _numbers(self) -> Tensor:
        """Return the values, of a form that has any, at the precision the layer computes in."""
        if self.scheme is None:
            return self.get_parameter("values")
        packed, scale = self.get_buffer("values_packed"), self.get_parameter("values_scale")
        count = self._values_shape.numel()
        return read_values(packed, scale, count, self.scheme).view(self._values_shape)

    @classmethod
    def stored(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module as the file holds them: those of `shapes`, packed.

        Raises
        ------
        ValueError
            If no weight of that shape can have that spec.
        """
        shapes = cls.shapes(d_out, d_in, spec, bias=bias)
        if spec.get("scheme") is None:
            return shapes
        if list(spec.get("shape", [d_out, d_in])) != [d_out, d_in]:
            raise ValueError(f"shape must be [{d_out}, {d_in}], got {spec['shape']}")
        return Scheme.read(spec["scheme"]).stored(shapes)

    @classmethod
    @abstractmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module before any of them is packed.

        Parameters
        ----------
        d_out, d_in : int
            Shape of the dense weight.
        bias : bool
            Whether the dense layer has one; a spec with a bias of its own needs none to be so.

        Raises
        ------
        ValueError
            If no weight of that shape can have that spec.
        """

    @classmethod
    @abstractmethod
    def dense_shape(cls, name: str, spec: Spec, found: Mapping[str, list[int]]) -> tuple[int, int]:
        """Read ``(d_out, d_in)`` off the shapes of a checkpoint's tensors, by their full names.

        Raises
        ------
        KeyError, IndexError
            If a tensor that tells is not there, or has too few dimensions to tell.
        """

    @classmethod
    @abstractmethod
    def largest_step(cls, d_out: int, d_in: int) -> int:
        """Return the number of the largest sizes there are: they are counted from 1."""

    @classmethod
    @abstractmethod
    def sizes_at(cls, step: int, d_out: int, d_in: int, ratio: float = 2.0) -> Sizes:
        """Return the sizes of a number; the larger, the more is stored.

        `ratio` is that of the first size over the last, of a form that has more than one.
        """

    @classmethod
    def two_of_four(cls, d_out: int, d_in: int, sizes: Sizes) -> Sizes:
        """Return the sizes of pattern 2:4 nearest to `sizes`, of a form that has the pattern.

        Raises
        ------
        ValueError
            If no weight of that shape can have the pattern.
        """
        raise NotImplementedError

    @classmethod
    def check_pattern(cls, d_out: int, d_in: int, spec: Spec) -> None:
        """Refuse sizes that rule out the pattern that a spec claims.

        Raises
        ------
        ValueError
        """
        if spec.get("pattern") is None:
            return
        needed = cls.two_of_four(d_out, d_in, {name: spec[name] for name in cls.SIZES})
        if any(spec[name] != size for name, size in needed.items()):
            asked = " and ".join(f"{name} {size}" for name, size in needed.items())
            found = " and ".join(str(spec[name]) for name in needed)
            raise ValueError(f"pattern 2:4 needs {asked} for [{d_out}, {d_in}], got {found}")

    @classmethod
    def extra(cls, d_out: int, d_in: int) -> Spec:
        """Return what a spec holds beside form and sizes so that its tensors tell the shape."""
        return {}

    @classmethod
    def written(cls, d_out: int, d_in: int, sizes: Sizes) -> str:
        """Return the sizes as a table shows them."""
        return ", ".join(str(sizes[name]) for name in cls.SIZES)

    @classmethod
    @abstractmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count the multiplications with a weight that one token costs."""

    @classmethod
    def empty(cls, dense: Any, spec: Spec) -> Self:
        """Make the module that takes the place of `dense`, on its device and at its precision.

        Its weights are uninitialised: they are about to be loaded.
        """
        d_out, d_in = dense.weight.shape
        return cls(
            d_in,
            d_out,
            **{name: spec[name] for name in cls.SIZES},
            bias=getattr(dense, "bias", None) is not None or bool(spec.get("bias")),
            scheme=spec.get("scheme"),
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )

    @abstractmethod
    def product(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float32."""

    def attach(self, model: nn.Module, spec: Spec) -> None:
        """Find what the form borrows from other modules of `model`; most forms borrow nothing.

        Raises
        ------
        ValueError
            If what is there cannot be borrowed.
        """

    def dense(self) -> nn.Linear:
        """Return the ordinary linear layer that computes the same function."""
        like = next(self.parameters())
        holder, _, leaf = self.BIAS.rpartition(".")
        bias = getattr(self.get_submodule(holder), leaf)
        linear = empty_linear(
            self.in_features,
            self.out_features,
            bias=bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.product())
            if bias is not None:
                linear.bias.copy_(bias)
        return linear

    def extra_repr(self) -> str:
        """Show the sizes in a printed model."""
        sizes = "".join(f", {name}={getattr(self, name)}" for name in self.SIZES)
        scheme = "" if self.scheme is None else f", {self.scheme}"
        return f"d_in={self.in_features}, d_out={self.out_features}{sizes}{scheme}"

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        """Say what is wrong with a spec that was read from a config; None if nothing."""
        for name in cls.SIZES:
            size = spec.get(name)
            if not isinstance(size, int) or size is True or size < 1:
                return f"must hold '{name}': N >= 1"
        if not isinstance(spec.get("bias", False), bool):
            return "must hold true or false as 'bias'"
        if spec.get("pattern") not in (None, *cls.PATTERNS):
            return f"must hold no 'pattern'{''.join(f' but {name!r}' for name in cls.PATTERNS)}"
        return None if spec.get("scheme") is None else _scheme_problem(spec)

    @classmethod
    @cache  # an allocation asks for every size of every matrix, and matrices share their shapes
    def stored_bits(
        cls, d_out: int, d_in: int, *, bits: int, scheme: str | None = None, **sizes: int
    ) -> int:
        """Count all bits in the file that stand for the weight; `bits` is of one number.

        Indices, scales and the sentinel count; a bias does not, as it does not in the dense layer.
        """
        shapes = cls.stored(d_out, d_in, {**sizes, "scheme": scheme}, bias=False).values()
        return sum(prod(shape) * (dtype.itemsize * 8 if dtype else bits) for shape, dtype in shapes)

    @classmethod
    def parameters_stored(
        cls, d_out: int, d_in: int, *, scheme: str | None = None, **sizes: int
    ) -> int:
        """Count the numbers that stand for the weight: no indices, no sentinel."""
        shapes = cls.shapes(d_out, d_in, {**sizes, "scheme": scheme}, bias=False).values()
        return sum(prod(shape) for shape, dtype in shapes if dtype is None)


def _scheme_problem(spec: Spec) -> str | None:
    shape = spec.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int for n in shape):
        return "must hold 'shape': [d_out, d_in] with a 'scheme'"
    try:
        Scheme.read(spec["scheme"])
    except (TypeError, ValueError) as error:
        return f"has a 'scheme' that {error}"
    return None
