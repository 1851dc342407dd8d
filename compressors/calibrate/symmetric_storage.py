"""Symmetric matrices in half the space: rectangular full packed storage.

The lower triangle of a matrix [n, n] fills a rectangle [n, k] with ``k = ceil(n / 2)``: its first k
columns, whose triangle of ``k - 1`` unused columns above the diagonal takes the last ``k - 1``
columns, transposed. If n is even, one column remains, which is stored apart: a rectangle of 2^m
numbers takes no more than that in pinned memory, which PyTorch rounds up to a power of two.

Reference: F. G. Gustavson et al., "Rectangular Full Packed Format for Cholesky's Algorithm", ACM
TOMS 37(2), 2010, https://doi.org/10.1145/1731022.1731028; there, the column is the first row of the
rectangle.
"""

import torch
from torch import Tensor

BLOCK = 1024
"""Rows that are mirrored at once."""


def packed_numbers(n: int) -> int:
    """Return how many numbers of a matrix [n, n] are stored."""
    return n * (n + 1) // 2


def pack_symmetric(H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower triangle of a matrix [n, n] as a rectangle, and the column that remains.

    The column is empty if n is odd.
    """
    n = len(H)
    k = (n + 1) // 2
    rectangle = H[:, :k].clone(memory_format=torch.contiguous_format)
    _corner(rectangle).tril_(-1).add_(H[n - k + 1 :, n - k + 1 :].mT.triu())
    column = H[k:, k].contiguous() if n == 2 * k else H.new_empty(0)
    return rectangle, column


def unpack_symmetric(rectangle: Tensor, column: Tensor) -> Tensor:
    """Return the symmetric matrix [n, n] that was packed; a square is one that was not."""
    n, k = rectangle.shape
    if n == k:
        return rectangle
    H = rectangle.new_empty(n, n)
    H[:, :k] = rectangle
    if n == 2 * k:
        H[k:, k] = column
    H[n - k + 1 :, n - k + 1 :] = _corner(rectangle).mT
    for start in range(0, n, BLOCK):  # the lower triangle is complete; mirror it
        block = slice(start, min(start + BLOCK, n))
        square = H[block, block].tril_()
        square.add_(square.tril(-1).mT)
        H[block, block.stop :] = H[block.stop :, block].mT
    return H


def _corner(rectangle: Tensor) -> Tensor:
    """Return the square [k - 1, k - 1] whose upper triangle has the last columns, transposed."""
    k = rectangle.shape[1]
    return rectangle[: k - 1, 1:]
