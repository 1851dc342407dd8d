"""Refitting a layer so that it compensates for the error of the compressed layers before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import whitening_factor

COLUMNS = 2048
"""Columns of a difference of moments that are in memory at the same time."""


@dataclass(frozen=True)
class PrefixMoments:
    """Sums over tokens of a layer's inputs X, and X' if all layers before it are compressed."""

    H: Tensor
    """``X'.T @ X'`` [d_in, d_in]"""
    cross: Tensor
    """``X.T @ X'`` [d_in, d_in]"""
    deficit: dict[str, Tensor]
    """For each linear that writes to the residual stream ``(R - R').T @ X'`` [d_out, d_in], where
    R and R' are the residual streams to which its output is added."""
    n_tokens: int | None = None
    """Tokens of an expert; None for all other layers, which receive all of them."""


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
    """Return the weight that maps the compressed model's inputs to the dense model's outputs.

    Minimizes the squared difference between ``X' V^T`` and
    ``(1 - mix) X' W^T + mix X W^T + residual (R - R')`` over V, with the matrices of
    `PrefixMoments`. V [d_out, d_in], in float64, is then compressed in place of W, under the metric
    `H_prefix`. A description of any fallback is returned with it.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        Weight of the dense model.
    H_prefix, cross : Tensor, shape [d_in, d_in]
        ``X'.T @ X'`` and ``X.T @ X'``.
    mix : float
        Fraction of the dense model's outputs in the target, in [0, 1].
    damp : float
        Fraction of ``mean(diag(H_prefix))`` added to its diagonal.
    deficit : Tensor, shape [d_out, d_in], optional
        ``(R - R').T @ X'``, for a layer that writes to the residual stream.
    residual : float
        Fraction of the residual stream's error that the layer is to correct, in [0, 1].

    Raises
    ------
    ValueError
        If `mix` or `residual` is out of range.

    Notes
    -----
    The target of Pivoting Factorization (https://arxiv.org/abs/2501.19090) plus the term of the
    stream: ``V = W + (mix W (cross - H') + residual deficit) H'^{-1}``. Without damping and stream
    it equals the paper's ``W ((1 - mix) I + mix cross H'^{-1})``. Damping pulls V towards W here;
    in the paper's form it would scale W by ``1 - mix`` in directions without tokens.
    """
    for name, value in (("mix", mix), ("residual", residual)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    W, H = W.double(), H_prefix.double()
    if mix == 0 and (residual == 0 or deficit is None):
        return W, None
    if not H.diagonal().any():
        return W, "inputs were all zero; nothing to compensate"
    # H is the largest tensor: with 14336 inputs, each matrix of its size has 1.5 GiB.
    correction = _product_of_difference(W, cross, H).mul_(mix)  # [d_out, d_in]
    if deficit is not None:
        correction.add_(deficit.double(), alpha=residual)
    L, fallback = whitening_factor(H, damp)
    del H
    # Two triangular solves, as cholesky_solve would copy the factor on a GPU.
    half = torch.linalg.solve_triangular(L.T, correction, upper=True, left=False)
    return W + torch.linalg.solve_triangular(L, half, upper=False, left=False), fallback


def _product_of_difference(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ``W @ (A - B)`` in float64, without another matrix of the size of A."""
    columns = zip(A.split(COLUMNS, dim=1), B.split(COLUMNS, dim=1), strict=True)
    return torch.cat([W @ (a.double() - b) for a, b in columns], dim=1)
