"""Let a layer make up for what the compressed layers before it already lost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import whitening_factor


@dataclass(frozen=True)
class PrefixMoments:
    """Sums over tokens, of inputs X' behind what is compressed so far and X of the dense model.

    `H` is ``X'.T @ X'`` and `cross` ``X.T @ X'``, both [d_in, d_in]. `deficit` holds, for a linear
    that writes to the residual stream, ``(R - R').T @ X'`` [d_out, d_in] with the streams R and R'
    that its output is added to.
    """

    H: Tensor
    cross: Tensor
    deficit: dict[str, Tensor]


def refit_target(
    W: Tensor,
    H_prefix: Tensor,
    cross: Tensor,
    *,
    mix: float,
    damp: float,
    deficit: Tensor | None = None,
    residual: float = 0.0,
) -> tuple[Tensor, str | None]:
    """Return the weight that answers the compressed model's inputs with the dense model's outputs.

    With inputs ``X`` of the dense model and ``X'`` behind the compressed prefix, both
    [n_tokens, d_in], the result V brings ``X' V^T`` closest to
    ``(1 - mix) X' W^T + mix X W^T + residual (R - R')``. It is factored in place of W, under the
    metric `H_prefix`. R and R' [n_tokens, d_out] are the residual streams that the layer's output
    is added to, dense and behind the compressed prefix.

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
    deficit : Tensor, shape [d_out, d_in], optional
        ``(R - R').T @ X'``, of a layer that writes to the residual stream.
    residual : float
        Share of the stream's deficit that the layer aims to make up for, in [0, 1].

    Returns
    -------
    V : Tensor, shape [d_out, d_in]
        In float64.
    fallback : str or None
        What had to be done beyond the request; None if nothing.

    Raises
    ------
    ValueError
        If `mix` or `residual` is out of range.

    Notes
    -----
    The target of [1]_, to which the stream is added, solved by Cholesky:
    ``V = W + (mix W (cross - H') + residual deficit) H'^{-1}``; without the stream that is
    ``W ((1 - mix) I + mix cross H'^{-1})``. The two differ once H' is damped: written as a
    correction, damping pulls V towards W; written as in the paper, it would shrink by `mix` what W
    does in the directions that no token has.

    References
    ----------
    .. [1] J. Zhao et al., "Pivoting Factorization: A Compact Meta Low-Rank Representation of
       Sparsity for Efficient Inference in Large Language Models", 2025.
       https://arxiv.org/abs/2501.19090
    """
    for name, share in (("mix", mix), ("residual", residual)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    W, H = W.double(), H_prefix.double()
    if mix == 0 and (residual == 0 or deficit is None):
        return W, None
    if not H.diagonal().any():
        return W, "inputs were all zero; nothing to compensate"
    L, fallback = whitening_factor(H, damp)
    moved = mix * (W @ (cross.double() - H))  # [d_out, d_in]
    if deficit is not None:
        moved += residual * deficit.double()
    return W + torch.cholesky_solve(moved.T, L).T, fallback
