"""Places of a tensor: how the largest numbers are chosen, and how the places are stored.

Places are numbered row by row. They are stored as the Golomb code of the gaps between them, or as
one bit per number of the tensor, whichever is shorter.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrc.compressors.deltas.golomb import (
    Bits,
    Whole,
    code_length,
    decode_gaps,
    encode_gaps,
    optimal_parameter,
)

BITMAP = 0
"""In place of the parameter of a Golomb code: one bit per number."""


def largest(magnitudes: NDArray[np.floating], fraction: float) -> Whole:
    """Return the places, in order, of a fraction of numbers [n] with the largest magnitudes.

    At least one place is chosen, and none that is zero. Of equal numbers the first ones are taken,
    so that the result is the same on all machines.
    """
    nonzero = int(np.count_nonzero(magnitudes))
    count = min(max(1, round(fraction * len(magnitudes))), nonzero)
    if count == nonzero:
        return np.flatnonzero(magnitudes)
    least = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    chosen = magnitudes > least
    equal = np.flatnonzero(magnitudes == least)[: count - int(chosen.sum())]
    chosen[equal] = True
    return np.flatnonzero(chosen)


def encode_places(places: Whole, n: int) -> tuple[Bits, int]:
    """Return the code of ascending places in [0, n), and its parameter or `BITMAP`."""
    gaps = np.diff(places, prepend=-1) - 1
    m = optimal_parameter(gaps)
    if code_length(gaps, m) < n or not len(places):
        return encode_gaps(gaps, m), m
    bitmap = np.zeros(n, dtype=bool)
    bitmap[places] = True
    return bitmap, BITMAP


def decode_places(bits: Bits, count: int, m: int, n: int) -> tuple[Whole, int]:
    """Return `count` places from the start of `bits`, and the number of bits that they take.

    Raises
    ------
    ValueError
        If the bits do not contain that many places in [0, n).
    """
    if m == BITMAP:
        places, used = np.flatnonzero(bits[:n]), n
    else:
        gaps, used = decode_gaps(bits, count, m)
        places = np.cumsum(gaps + 1) - 1
    if len(places) != count or (count and places[-1] >= n):
        raise ValueError(f"the code does not contain {count} places of {n}")
    return places, used


def pack(bits: Bits) -> Tensor:
    """Return bits as bytes, the lowest bit first; those after the last are zero."""
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack(packed: Tensor) -> Bits:
    """Return the bits of `pack`, and up to seven zeros."""
    return np.unpackbits(packed.numpy(), bitorder="little").astype(bool)
