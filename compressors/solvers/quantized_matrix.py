"""A matrix of integers with scales, and round-to-nearest quantization."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.packing import dequantize, encode_matrix
from lrc.compressors.solvers.quantization_grid import Grid, find_grid, round_to_grid

NUMBERS = 2**24
"""Numbers of an embedding that are quantized at once, in float64."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """Integer codes, scales and zero points, at the precision of the file.

    Within solvers also those of several matrices, stacked in a first dimension.
    """

    codes: Tensor
    """[rows, columns], int8"""
    scale: Tensor
    """[rows, groups]"""
    zero: Tensor | None
    """[rows, groups], int8, the codes of zero; None for a symmetric scheme."""
    scheme: QuantizationArgs
    fallback: str | None = None

    def weight(self) -> Tensor:
        """Return the dequantized matrix [rows, columns] in float64."""
        return dequantize(self.codes, self.scale.double(), self.zero)

    def encode(self, leaf: str) -> dict[str, Tensor]:
        """Return the tensors to store, named after `leaf`, the name in the module."""
        return encode_matrix(leaf, self.codes, self.scale, self.zero, self.scheme)


def round_to_nearest(
    W: Tensor, scheme: QuantizationArgs, *, dtype: torch.dtype, H: Tensor | None = None
) -> QuantizedMatrix:
    """Round every number of a matrix [rows, columns] to the nearest point of its grid.

    Scales are stored in `dtype`. The diagonal of `H` [columns, columns], the second moment of the
    inputs, weights the errors by which `find_grid` chooses, which also raises the errors.
    """
    grid = find_grid(W, scheme, dtype=dtype, weights=None if H is None else H.diagonal())
    return rounded(W, grid, scheme)


def rounded(W: Tensor, grid: Grid, scheme: QuantizationArgs) -> QuantizedMatrix:
    """Round every number of a matrix [rows, columns] to the nearest point of a grid."""
    return QuantizedMatrix(round_to_grid(W, grid, scheme), grid.scale, grid.zero, scheme)


def row_errors(E: Tensor, H: Tensor) -> Tensor:
    """Return ``e H e^T`` for every row e of an error [rows, columns]."""
    return ((E @ H) * E).sum(dim=1)


def better_rows(
    W: Tensor, H: Tensor, first: QuantizedMatrix, second: QuantizedMatrix
) -> QuantizedMatrix:
    """Combine the rows of smaller error under `H` from two quantizations of `W`.

    All matrices are in float64. If errors are equal, the row of `first` is taken; so is `fallback`.
    """
    # The difference of both errors, ``d H s^T`` with the difference and the sum of both residuals.
    one, other = first.weight(), second.weight()
    difference = other - one
    total = one.add_(other).sub_(W, alpha=2).neg_()
    pick = ((difference @ H).mul_(total).sum(dim=1) > 0)[:, None]  # [rows, 1]
    codes = torch.where(pick, second.codes, first.codes)
    scale = torch.where(pick, second.scale, first.scale)
    zero = first.zero
    if zero is not None and second.zero is not None:
        zero = torch.where(pick, second.zero, zero)
    return replace(first, codes=codes, scale=scale, zero=zero)
