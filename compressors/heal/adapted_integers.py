"""Integers to which an adapter is added: they are rounded in every step.

Gradients pass the rounding straight through, as in LR-QAT [1]_. The adapter is added to the matrix
before it was quantized, in which many numbers are close to the next code.

References
----------
.. [1] Y. Bondarenko et al., "Low-Rank Quantization-Aware Training for LLMs", 2024.
   https://arxiv.org/abs/2406.06385
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.heal.adapted_matrices import AbsorbingMatrix
from lrc.compressors.heal.adapters import Adapter
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import repack_integers

LARGEST_OFFSET = 0.49
"""Of a number from its code, in steps; at a half the code would be the next one."""


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
