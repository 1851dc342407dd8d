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

    Damping pulls the solution towards the given `B`, so that the error never rises.

    Parameters
    ----------
    target : Tensor, shape [d_out, d_in]
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs.
    damp : float
        Fraction of the mean diagonal of ``A H A^T`` added to it.

    Returns
    -------
    B : Tensor, shape [d_out, rank]
    H_rank : Tensor, shape [rank, rank]
        ``A H A^T``, the second moment of the inputs of B.
    """
    H_rank = A @ H @ A.T
    if not H_rank.diagonal().any():
        return B, H_rank
    L, _ = whitening_factor(H_rank, damp)
    missing = (target - B @ A) @ H @ A.T  # [d_out, rank]
    return B + torch.cholesky_solve(missing.T, L).T, H_rank


def refit_right(
    target: Tensor, B: Tensor, A: Tensor, G: Tensor | None = None, damp: float = REFIT_DAMP
) -> Tensor:
    """Minimize ``tr((V - B A)^T G (V - B A))`` over the right factor A [rank, d_in].

    The solution ``(B^T G B)^{-1} B^T G V`` is optimal under every metric of the inputs, but
    depends on the second moment `G` [d_out, d_out] of the output gradients. The other parameters
    are those of `refit_left`.
    """
    left = B.T if G is None else B.T @ G  # [rank, d_out]
    normal = left @ B  # [rank, rank]
    if not normal.diagonal().any():
        return A
    L, _ = whitening_factor(normal, damp)
    return A + torch.cholesky_solve(left @ (target - B @ A), L)


def compensation_target(E: Tensor, G: Tensor | None, fixed: int) -> Tensor | float:
    """Return the correction to the target of the free rows that cancels the fixed rows' error.

    Parameters
    ----------
    E : Tensor, shape [fixed, d_in]
        Error of the first `fixed` rows, which cannot change.
    G : Tensor, shape [d_out, d_out], optional
        Second moment of the output gradients.
    fixed : int

    Returns
    -------
    Tensor, shape [d_out - fixed, d_in], or float
        ``G_oo^{-1} G_of E`` with o the free and f the fixed rows: ``tr(G E H E^T)`` is least if
        the error of the free rows is the negative of this. 0 without `G`.
    """
    if G is None:
        return 0.0
    L, _ = whitening_factor(G[fixed:, fixed:], REFIT_DAMP)
    return torch.cholesky_solve(G[fixed:, :fixed] @ E, L)
