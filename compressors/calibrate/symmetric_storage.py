"""Symmetric matrices in half the space: rectangular full packed storage.

The lower triangle of a matrix [n, n] fills a rectangle: its first ``k = ceil(n / 2)`` columns have
a triangle of unused places above the diagonal, which takes the lower triangle of the remaining
``n - k`` columns, transposed.

Reference: F. G. Gustavson et al., "Rectangular Full Packed Format for Cholesky's Algorithm", ACM
TOMS 37(2), 2010, https://doi.org/10.1145/1731022.1731028.
"""

from torch import Tensor

BLOCK = 1024
"""Rows that are mirrored at once."""


def packed_shape(n: int) -> tuple[int, int]:
    """Return the shape of the rectangle of a matrix [n, n]: n (n + 1) / 2 numbers."""
    return n + 1 - n % 2, (n + 1) // 2


def pack_symmetric(H: Tensor) -> Tensor:
    """Return the lower triangle of a matrix [n, n] as a rectangle, see `packed_shape`."""
    n = len(H)
    packed = H.new_empty(packed_shape(n))
    k = packed.shape[1]
    packed[-n:] = H[:, :k]
    corner = _corner(packed)
    corner.copy_(corner.tril(-1).add_(H[k:, k:].mT.triu()))
    return packed


def unpack_symmetric(packed: Tensor) -> Tensor:
    """Return the symmetric matrix [n, n] of a rectangle."""
    rows, k = packed.shape
    n = 2 * k if rows > 2 * k else rows
    H = packed.new_empty(n, n)
    H[:, :k] = packed[-n:]
    H[k:, k:] = _corner(packed).mT
    for start in range(0, n, BLOCK):  # the lower triangle is complete; mirror it
        block = slice(start, min(start + BLOCK, n))
        square = H[block, block]
        square.copy_(square.tril() + square.tril(-1).mT)
        H[block, block.stop :] = H[block.stop :, block].mT
    return H


def _corner(packed: Tensor) -> Tensor:
    """Return the square whose upper triangle has the last columns, transposed."""
    rows, k = packed.shape
    odd = int(rows < 2 * k)
    return packed[: k - odd, odd:]
