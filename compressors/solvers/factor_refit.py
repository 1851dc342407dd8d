"""Least-squares updates of one factor of ``W ~ B @ A`` after the other one has been quantized."""

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import whitening_factor

REFIT_DAMP = 1e-8
"""Fraction of the mean diagonal of the normal equations added to their diagonal."""


def refit_left(
    target: Tensor, B: Tensor, A: Tensor, H: Tensor, damp: float = REFIT_DAMP
) -> tuple[Tensor, Tensor]:
    """Minimize ``tr((V - B A) H (V - B A)^T)`` over the left factor B, with V the target.

    Damping, a fraction of the mean diagonal of ``A H A^T``, pulls the solution towards the given
    `B`, so that the error never rises. Returns B [d_out, rank] and the second moment of its inputs,
    ``A H A^T`` [rank, rank].
    """
    H_rank = A @ H @ A.T
    if not H_rank.diagonal().any():
        return B, H_rank
    L, _ = whitening_factor(H_rank, damp)
    missing = (target - B @ A) @ H @ A.T  # [d_out, rank]
    return B + torch.cholesky_solve(missing.T, L).T, H_rank


def refit_right(target: Tensor, B: Tensor, A: Tensor, G: Tensor | None = None) -> Tensor:
    """Minimize ``tr((V - B A)^T G (V - B A))`` over the right factor A; see `refit_left`.

    The solution ``(B^T G B)^{-1} B^T G V`` is optimal under every second moment of the inputs, but
    depends on that of the output gradients, `G` [d_out, d_out].
    """
    left = B.T if G is None else B.T @ G  # [rank, d_out]
    normal = left @ B  # [rank, rank]
    if not normal.diagonal().any():
        return A
    L, _ = whitening_factor(normal, REFIT_DAMP)
    return A + torch.cholesky_solve(left @ (target - B @ A), L)


def compensation_target(E: Tensor, G: Tensor | None, fixed: int) -> Tensor | float:
    """Return the correction to the target of the free rows that cancels the fixed rows' error.

    The first `fixed` rows cannot change and have the error `E` [fixed, d_in]. With o the free and f
    the fixed rows, ``tr(G E H E^T)`` is least if the error of the free rows is
    ``-G_oo^{-1} G_of E``; the negative of this is returned [d_out - fixed, d_in], or 0 without `G`.
    """
    if G is None:
        return 0.0
    L, _ = whitening_factor(G[fixed:, fixed:], REFIT_DAMP)
    return torch.cholesky_solve(G[fixed:, :fixed] @ E, L)
