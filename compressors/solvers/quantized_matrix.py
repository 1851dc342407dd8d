"""A matrix as the integers it was rounded to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.compressors.layers.packed import dequantized, encode_matrix
from lrc.compressors.layers.scheme import Scheme


@dataclass(frozen=True)
class Rounded:
    """Integers, what one step of them is, and which stand for zero.

    Scales are at the precision of the file already, so that the codes belong to what is stored.
    """

    codes: Tensor
    """[rows, columns], int8"""
    scale: Tensor
    """[rows, groups]"""
    zero: Tensor | None
    """[rows, groups], int8; None of a symmetric scheme."""
    scheme: Scheme
    fallback: str | None = None
    """What had to deviate from the request, None if nothing."""

    def weight(self) -> Tensor:
        """Return the matrix [rows, columns] that the file stands for, in float64."""
        return dequantized(self.codes, self.scale.double(), self.zero)

    def encode(self, leaf: str) -> dict[str, Tensor]:
        """Write it as the tensors of the file, by `leaf`, its name within the module."""
        return encode_matrix(leaf, self.codes, self.scale, self.zero, self.scheme)


def row_errors(E: Tensor, H: Tensor) -> Tensor:
    """Return the share ``e H e^T`` of every row e of an error [rows, columns]: [rows]."""
    return ((E @ H) * E).sum(dim=1)


def better_rows(W: Tensor, H: Tensor, first: Rounded, second: Rounded) -> Rounded:
    """Take every row from whichever of two has the smaller error under H; `first` if equal.

    `W` [rows, columns] and `H` [columns, columns] are in float64; notes are those of `first`.
    """
    good = row_errors(W - first.weight(), H) <= row_errors(W - second.weight(), H)  # [rows]
    pick = ~good[:, None]
    zero = first.zero
    if zero is not None and second.zero is not None:
        zero = torch.where(pick, second.zero, zero)
    return replace(
        first,
        codes=torch.where(pick, second.codes, first.codes),
        scale=torch.where(pick, second.scale, first.scale),
        zero=zero,
    )
