"""Let a layer make up for what the compressed layers before it already lost."""

import torch
from torch import Tensor

from lrc.compressors.linalg import whitening_factor


def refit_target(
    W: Tensor, H_prefix: Tensor, cross: Tensor, *, mix: float, damp: float
) -> tuple[Tensor, str | None]:
    """Return the weight that answers the compressed model's inputs with the dense model's outputs.

    With inputs ``X`` of the dense model and ``X'`` behind the compressed prefix, both
    [n_tokens, d_in], the result V brings ``X' V^T`` closest to
    ``(1 - mix) X' W^T + mix X W^T``. It is factored in place of W, under the metric `H_prefix`.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        Weight of the dense model.
    H_prefix : Tensor, shape [d_in, d_in]
        ``X'.T @ X'``.
    cross : Tensor, shape [d_in, d_in]
        ``X.T @ X'``.
    mix : float
        Share of the dense model's outputs in the target, in [0, 1].
    damp : float
        Fraction of ``mean(diag(H_prefix))`` added to its diagonal.

    Returns
    -------
    V : Tensor, shape [d_out, d_in]
        In float64.
    fallback : str or None
        What had to be done beyond the request; None if nothing.

    Raises
    ------
    ValueError
        If `mix` is out of range.

    Notes
    -----
    The target of [1]_, solved by Cholesky: ``V = W + mix W (cross - H') H'^{-1}``, which is
    ``W ((1 - mix) I + mix cross H'^{-1})``. The two differ once H' is damped: written as a
    correction, damping pulls V towards W; written as in the paper, it would shrink by `mix` what W
    does in the directions that no token has.

    References
    ----------
    .. [1] J. Zhao et al., "Pivoting Factorization: A Compact Meta Low-Rank Representation of
       Sparsity for Efficient Inference in Large Language Models", 2025.
       https://arxiv.org/abs/2501.19090
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix}")
    W, H = W.double(), H_prefix.double()
    if mix == 0 or not H.diagonal().any():
        return W, None if mix == 0 else "inputs were all zero; nothing to compensate"
    L, fallback = whitening_factor(H, damp)
    moved = W @ (cross.double() - H)  # [d_out, d_in]
    return W + mix * torch.cholesky_solve(moved.T, L).T, fallback
