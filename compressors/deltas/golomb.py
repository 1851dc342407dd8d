"""Golomb code of the gaps between places, as arrays of bits.

A gap g is divided by the parameter m. The quotient is written in unary (as many ones, then a zero),
the remainder in truncated binary: with ``b = ceil(log2 m)``, the first ``2^b - m`` remainders take
b - 1 bits and the others b bits. The number of bits is that of the usual code; their order is not.
All quotients come first, then the first b - 1 bits of all remainders, then the last bit of those
that have one, so that millions of gaps are read without a loop.

The code is optimal for geometrically distributed gaps, which are those of places that are set
independently of each other [1]_ [2]_.

References
----------
.. [1] S. W. Golomb, "Run-length encodings", IEEE Transactions on Information Theory, 1966.
.. [2] R. G. Gallager and D. C. van Voorhis, "Optimal source codes for geometrically distributed
   integer alphabets", IEEE Transactions on Information Theory, 1975.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]
Whole = NDArray[np.int64]
CELLS = 2**20
"""Entries of a table of gaps and parameters that is in memory at once."""


def optimal_parameter(gaps: Whole) -> int:
    """Return the smallest m for which the code of `gaps` is shortest; 1 without gaps."""
    if not len(gaps):
        return 1
    distinct, counts = np.unique(gaps, return_counts=True)
    best, shortest = 1, int(gaps.sum()) + len(gaps)
    rows = max(1, CELLS // len(distinct))
    first, last = 2, int(distinct[-1]) + 1
    while first <= last:
        # Every gap takes at least the zero of its quotient and b - 1 bits of its remainder.
        if len(gaps) * (first - 1).bit_length() >= shortest:
            break
        # Up to the next power of two, the bound stays the same.
        end = min(last, 1 << (first - 1).bit_length(), first + rows - 1)
        parameters = np.arange(first, end + 1)
        lengths = _lengths(distinct[None], parameters[:, None]) @ counts
        place = int(lengths.argmin())
        if lengths[place] < shortest:
            best, shortest = int(parameters[place]), int(lengths[place])
        first = end + 1
    return best


def code_length(gaps: Whole, m: int) -> int:
    """Return the number of bits of the code of `gaps` with the parameter `m`."""
    return int(_lengths(gaps, np.int64(m)).sum())


def encode_gaps(gaps: Whole, m: int) -> Bits:
    """Return the code of `gaps`, each at least 0, with the parameter `m`, at least 1."""
    quotients, remainders = np.divmod(gaps, m)
    unary = np.ones(int(quotients.sum()) + len(gaps), dtype=bool)
    unary[np.cumsum(quotients + 1) - 1] = False
    width, cutoff = _layout(m)
    if m == 1:
        return unary
    long = remainders >= cutoff
    numbers = np.where(long, remainders + cutoff, remainders << 1)  # in b bits; short ones end in 0
    first = ((numbers[:, None] >> np.arange(1, width + 1)) & 1).astype(bool)  # [gaps, width]
    return np.concatenate([unary, first.ravel(), (numbers[long] & 1).astype(bool)])


def decode_gaps(bits: Bits, count: int, m: int) -> tuple[Whole, int]:
    """Return `count` gaps from the start of `bits`, and the number of bits that they take.

    Raises
    ------
    ValueError
        If the bits end too early.
    """
    ends = np.flatnonzero(~bits)[:count]
    width, cutoff = _layout(m)
    at = int(ends[-1]) + 1 if len(ends) else 0
    if len(ends) < count or len(bits) < at + count * width:
        raise ValueError(f"{len(bits)} bits do not hold {count} gaps")
    quotients = np.diff(ends, prepend=-1) - 1
    if m == 1:
        return quotients, at
    first = bits[at : at + count * width].reshape(count, width).astype(np.int64)
    remainders = first @ (1 << np.arange(width, dtype=np.int64))
    at += count * width
    long = remainders >= cutoff
    extra = bits[at : at + int(long.sum())]
    if len(extra) < long.sum():
        raise ValueError(f"{len(bits)} bits do not hold {count} gaps")
    remainders[long] = 2 * remainders[long] + extra - cutoff
    return quotients * m + remainders, at + len(extra)


def _layout(m: int) -> tuple[int, int]:
    """Return the bits that every remainder takes, and the first remainder that takes one more."""
    b = (m - 1).bit_length()
    return max(b - 1, 0), (1 << b) - m


def _lengths(gaps: Any, m: Any) -> Whole:
    """Return the number of bits of every gap with every parameter, broadcast."""
    b = np.ceil(np.log2(m)).astype(np.int64)  # exact: a power of two has an exact logarithm
    long = gaps % m >= (1 << b) - m
    found: Whole = gaps // m + 1 + np.where(m > 1, b - 1 + long, 0)
    return found
