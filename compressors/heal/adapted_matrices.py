"""Stored matrices to which an adapter is added, and which absorb it.

A 16-bit matrix takes the sum. That includes the factors of a low-rank component, each of which has
an adapter: their product has the same rank as before, while that of the sum ``B A + delta`` would
have to be truncated again. With masks the difference is masked, too (MaskLoRA [1]_). Integers are
rounded in every step, with straight-through gradients (LR-QAT [2]_): the adapter is added to the
matrix before it was quantized, in which many numbers are close to the next code. So training
computes with what is stored, up to rounding to 16 bits.

References
----------
.. [1] M. Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023.
   https://arxiv.org/abs/2312.15230
.. [2] Y. Bondarenko et al., "Low-Rank Quantization-Aware Training for LLMs", 2024.
   https://arxiv.org/abs/2406.06385
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.heal.adapters import Adapter
from lrc.compressors.layers.bitmask import unpack_bits
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.masked_weight import MaskedWeight
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import repack_integers

LARGEST_OFFSET = 0.49
"""Of a number from its code, in steps; at a half the code would be the next one."""


class AdaptedMatrix(ABC):
    """A matrix of a module that can be given one adapter.

    Parameters
    ----------
    module : nn.Module
        A module whose `forward` multiplies by the matrix.
    """

    adapter: Adapter | None = None

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the matrix."""

    @property
    @abstractmethod
    def numbers(self) -> Tensor:
        """The numbers of the matrix, without those that a mask sets to zero."""

    @property
    def size(self) -> float:
        """Root mean square of the matrix."""
        return float(self.numbers.detach().float().square().mean().sqrt())

    @property
    def like(self) -> str:
        """What follows the name of the matrix in that of a tensor stored in the same dtype."""
        return ""

    @abstractmethod
    def attach(self, adapter: Adapter) -> None:
        """Add an adapter to the matrix in all calls of the module from now on."""

    @abstractmethod
    def as_stored(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Compute as if the adapter were stored in `dtype`, inside the context."""

    @abstractmethod
    def merge_(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Store the adapter; return the tensors by what follows the name of the matrix."""


class AbsorbingMatrix(AdaptedMatrix):
    """A matrix whose stored form can represent the sum with an adapter."""

    LEAF: str
    """Name of the stored tensor within the module."""

    @abstractmethod
    def detach(self) -> None:
        """Remove the adapter."""

    @abstractmethod
    def merged(self) -> Tensor:
        """Return the stored tensor with the adapter in it, in the dtype of the module."""

    @contextmanager
    def as_stored(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute with the sum as it would be stored, inside the context."""
        adapter = self.adapter
        assert adapter is not None
        before = getattr(self.module, self.LEAF).detach().clone()
        self.merge_(dtype)
        try:
            yield
        finally:
            self._replace_(before)
            self.attach(adapter)

    def merge_(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Replace the stored tensor by the sum, and return it."""
        merged = self.merged().to(dtype)
        self.detach()
        self._replace_(merged)
        return {"": merged}

    @torch.no_grad()
    def _replace_(self, tensor: Tensor) -> None:
        getattr(self.module, self.LEAF).copy_(tensor)


class FloatMatrix(AbsorbingMatrix):
    """The weight of a linear layer: of a dense one, or a factor of a component."""

    LEAF = "weight"
    module: nn.Linear

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the matrix."""
        return self.module.out_features, self.module.in_features

    @property
    def numbers(self) -> Tensor:
        """The matrix."""
        return self.module.weight

    def attach(self, adapter: Adapter) -> None:
        """Add the product with the adapter to the output."""
        self.adapter = adapter
        self._hook = self.module.register_forward_hook(lambda _, args, y: adapter(args[0], y))

    def detach(self) -> None:
        """Remove the adapter."""
        self.adapter = None
        self._hook.remove()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the sum of matrix and adapter."""
        assert self.adapter is not None
        return self.module.weight + self.adapter.delta()


class MaskedValues(AbsorbingMatrix):
    """The values of a mask, or the coefficients of a dictionary."""

    LEAF = "values"
    module: MaskedWeight

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix with its zeros."""
        return self.module.d_out, self.module.layout()[1]

    @property
    def numbers(self) -> Tensor:
        """The values."""
        return self.module.get_parameter("values")

    @property
    def places(self) -> Tensor:
        """Places of the values in the flattened matrix, in the order of the values."""
        buffers, (rows, columns) = dict(self.module.named_buffers()), self.shape
        if "mask" in buffers:
            return unpack_bits(buffers["mask"], columns).flatten().nonzero().flatten()
        first = torch.arange(rows, device=buffers["index"].device) * columns
        return (first[:, None] + buffers["index"].long()).flatten()

    def attach(self, adapter: Adapter) -> None:
        """Add the adapter at the places of the mask."""
        self.adapter, places = adapter, self.places
        parameters: dict[str, Any] = self.module._parameters
        values = parameters["values"]

        def add(*_: Any) -> None:
            changes = adapter.delta().flatten().index_select(0, places)
            parameters["values"] = values + changes.view_as(values)

        def remove(*_: Any) -> None:
            parameters["values"] = values

        # Also if the call ends early, as it does where checkpointing computes it again.
        self._hooks = [
            self.module.register_forward_pre_hook(add),
            self.module.register_forward_hook(remove, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the adapter."""
        self.adapter = None
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the values with the differences at their places."""
        assert self.adapter is not None
        values = self.numbers
        return values + self.adapter.delta().flatten()[self.places].view_as(values)


class IntegerMatrix(AbsorbingMatrix):
    """A matrix of integers with scales, which do not change."""

    LEAF = "weight_packed"
    module: PackedLinear | Dense
    _offsets: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the matrix."""
        return self.module.packed_shape

    @property
    def numbers(self) -> Tensor:
        """The dequantized matrix."""
        return self.module.packed_matrix()

    @torch.no_grad()
    def start_from(self, W: Tensor) -> None:
        """Add the adapter to the matrix `W` [d_out, d_in] that the codes are rounded from.

        Where a code is not the nearest one, its place is moved to the edge of the nearest.
        """
        codes, zero, scale = self.module.codes(), self.module.zero_points(), self._scale
        exact = W.to(scale).view(*scale.shape[:2], -1) / scale
        if zero is not None:
            exact = exact + zero[:, :, None]
        offsets = exact - codes.view(exact.shape)
        self._offsets = offsets.clamp(-LARGEST_OFFSET, LARGEST_OFFSET).half()

    def attach(self, adapter: Adapter) -> None:
        """Multiply by the rounded sum."""
        self.adapter = adapter
        self._codes, zero = self.module.codes(), self.module.zero_points()
        self._zero = None if zero is None else zero[:, :, None].to(torch.int16)
        module: Any = self.module
        module.forward = lambda x: nn.functional.linear(x, self._matrix())

    def detach(self) -> None:
        """Remove the adapter."""
        self.adapter = None
        module: Any = self.module
        del module.forward

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the packed codes nearest to the sum."""
        args = self.module.packed_args
        assert args is not None
        return repack_integers(self._rounded().flatten(1).round().to(torch.int8), args.bits)

    @contextmanager
    def as_stored(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute as always: the sum is rounded in every call."""
        yield

    def _rounded(self) -> Tensor:
        """Return the codes nearest to the sum [d_out, groups, group_size]; gradients pass."""
        args, scale = self.module.packed_args, self._scale
        assert args is not None
        assert self.adapter is not None
        codes = self._codes.view(*scale.shape[:2], -1)
        exact = codes + self.adapter.delta().view(codes.shape) / scale
        if self._offsets is not None:
            exact = exact + self._offsets
        exact = exact.clamp(args.lowest, args.highest)
        return exact + (exact.round() - exact).detach()

    def _matrix(self) -> Tensor:
        rounded = self._rounded()
        steps = rounded if self._zero is None else rounded - self._zero
        return (steps * self._scale).flatten(1)

    @property
    def _scale(self) -> Tensor:
        return self.module.get_parameter("weight_scale")[:, :, None]


KINDS: dict[type[nn.Module], Callable[[Any], AbsorbingMatrix]] = {
    nn.Linear: FloatMatrix,
    PackedLinear: IntegerMatrix,
    Dense: IntegerMatrix,
    MaskedWeight: MaskedValues,
}


def adaptable(
    root: nn.Module, excluded: Iterable[nn.Module | None] = ()
) -> dict[str, AdaptedMatrix]:
    """Return the matrices of a model or a decoder layer by the names of their stored tensors.

    Quantized values of masks have no grid to round to that a matrix would have, and are left out.
    """
    skipped = {id(m) for module in excluded if module is not None for m in module.modules()}
    found: dict[str, AdaptedMatrix] = {}
    for name, module in root.named_modules():
        kind = next((make for type_, make in KINDS.items() if isinstance(module, type_)), None)
        if kind is None or id(module) in skipped:
            continue
        if isinstance(module, MaskedWeight) and module.config.quantization is not None:
            continue
        matrix = kind(module)
        found[f"{name}.{matrix.LEAF}"] = matrix
    return found
