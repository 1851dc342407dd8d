"""What is left of a product solved anew for the part that has been rounded."""

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import whitening_factor

REFIT_DAMP = 1e-8
"""Of the mean diagonal of what is solved."""


def refit(
    target: Tensor, B: Tensor, A: Tensor, H: Tensor, damp: float = REFIT_DAMP
) -> tuple[Tensor, Tensor]:
    """Solve the second factor anew for the first, as it has become.

    Minimises ``tr((V - B' A) H (V - B' A)^T)`` over B', V the target; damping pulls towards B, so
    that the error never rises.

    Parameters
    ----------
    target : Tensor, shape [d_out, d_in]
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    H : Tensor, shape [d_in, d_in]
    damp : float
        Fraction of the mean diagonal of ``A H A^T`` added to it.

    Returns
    -------
    B : Tensor, shape [d_out, rank]
    seen : Tensor, shape [rank, rank]
        ``A H A^T``, the second moment of what B is applied to.
    """
    seen = A @ H @ A.T
    if not seen.diagonal().any():
        return B, seen
    L, _ = whitening_factor(seen, damp)
    missing = (target - B @ A) @ H @ A.T  # [d_out, rank]
    return B + torch.cholesky_solve(missing.T, L).T, seen


def refit_first(
    target: Tensor, B: Tensor, A: Tensor, G: Tensor | None = None, damp: float = REFIT_DAMP
) -> Tensor:
    """Solve the first factor [rank, d_in] anew for the second, as `refit` the second.

    With the second held, the best first is the same under every metric of the inputs, but not of
    the outputs: under `G` [d_out, d_out] it is ``(B^T G B)^{-1} B^T G V``.
    """
    left = B.T if G is None else B.T @ G  # [rank, d_out]
    seen = left @ B  # [rank, rank]
    if not seen.diagonal().any():
        return A
    L, _ = whitening_factor(seen, damp)
    return A + torch.cholesky_solve(left @ (target - B @ A), L)


def made_up(E: Tensor, G: Tensor | None, fixed: int) -> Tensor | float:
    """Return what the other rows add to their target to make up for the first ones.

    The error E of the first `fixed` rows [fixed, d_in] is there to stay. Of
    ``tr(G E H E^T)`` the least is left if the error of the others is ``- G_oo^{-1} G_of E``: a
    metric of the outputs says which errors cancel.
    """
    if G is None:
        return 0.0
    L, _ = whitening_factor(G[fixed:, fixed:], REFIT_DAMP)
    return torch.cholesky_solve(G[fixed:, :fixed] @ E, L)
