"""Muon: matrices move along the orthogonal factor of their averaged gradient [1]_.

All singular values of an update are the same, so that directions with small gradients are trained
as fast as those with large ones. Low-rank factors have many of these: their spectra fall steeply.

References
----------
.. [1] K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
   https://kellerjordan.github.io/posts/muon/
.. [2] J. Liu et al., "Muon is Scalable for LLM Training", 2025. https://arxiv.org/abs/2502.16982
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration: singular values in (0, 1] end between 0.7 and 1.2 [1]_."""
ROOT_MEAN_SQUARE = 0.2
"""That of an update before it is multiplied by the learning rate, as Adam's usually are [2]_."""
PADDING = 64
"""Short sides are filled up with zeros to multiples of this, so that products are batched."""
EPSILON = 1e-20


def muon_updates(averages: Sequence[Tensor]) -> list[Tensor]:
    """Return the update of every matrix for its averaged gradient.

    Matrices of the same size are computed together.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(averages):
        short, long = sorted(matrix.shape)
        groups.setdefault((-(-short // PADDING) * PADDING, long), []).append(index)
    found: dict[int, Tensor] = {}
    for (short, long), indices in groups.items():
        like = averages[indices[0]]
        dtype = torch.bfloat16 if like.is_cuda else like.dtype
        stack = torch.zeros(len(indices), short, long, dtype=dtype, device=like.device)
        wide = [_wide(averages[index]) for index in indices]
        norms = torch.stack(torch._foreach_norm(wide)) + EPSILON
        for place, matrix, norm in zip(stack, wide, norms, strict=True):
            place[: len(matrix)] = matrix / norm
        for index, matrix, result in zip(indices, wide, orthogonalized(stack), strict=True):
            update = result[: len(matrix)].to(matrix.dtype) * (ROOT_MEAN_SQUARE * math.sqrt(long))
            found[index] = update.T if averages[index].shape != matrix.shape else update
    return [found[index] for index in range(len(averages))]


def orthogonalized(X: Tensor) -> Tensor:
    """Return matrices close to the orthogonal factors of matrices whose norm is at most one.

    ``X (X^T X)^(-1/2)`` by a Newton-Schulz iteration of the fifth order.

    Parameters
    ----------
    X : Tensor, shape [n, rows, columns]
        With at most as many rows as columns.
    """
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        squares = X @ X.mT  # [n, rows, rows]
        polynomial = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    return X


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
