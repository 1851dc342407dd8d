"""The one solver behind the SVD family: the best low-rank approximation under an input metric.

The rank-r minimiser of ``||(W - W_hat) L||_F`` is the truncated SVD of ``W L``, un-whitened
(Eckart-Young). No SVD is computed: the eigenvectors of the smaller of the two Gram matrices of
``W L`` give the same subspace, and nothing larger than ``min(d_out, d_in)`` is decomposed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.linalg import damped, descending_eigh, whitening_factor

# Directions below this share of the largest energy are rounding of float64 Gram matrices, not rank.
RANK_TOLERANCE = 1e-14


@dataclass(frozen=True)
class Factors:
    """A weight as a product, ``W_hat = B @ A``, and what it costs in quality.

    `B` is [d_out, rank], `A` is [rank, d_in] and is applied first. `loss` is the share of the
    weighted energy of W that is lost, in [0, 1]; `fallback` says what had to deviate from the
    request, None if nothing.
    """

    B: Tensor
    A: Tensor
    loss: float
    fallback: str | None = None

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Spectrum:
    """The energies of a weight under a metric, largest first, ready to be cut at any rank.

    `energies` [min(d_out, d_in)] are the squared singular values of ``W L``; the tail beyond a
    rank is the squared error of that rank: the rate-distortion curve of the matrix. `B` and `A`
    hold all components in order, `B @ A == W`.
    """

    energies: Tensor
    B: Tensor
    A: Tensor
    fallback: str | None = None

    def tail(self, rank: int) -> float:
        """Return the share of the energy that a cut at `rank` loses, in [0, 1]."""
        total = self.energies.sum()
        return float(self.energies[rank:].sum() / total) if total > 0 else 0.0

    def truncate(self, rank: int) -> Factors:
        """Cut at `rank`, with the scale of every component shared evenly by its two vectors.

        Even scales round best: neither factor then holds numbers much larger or smaller than the
        other's. A rank beyond the numerical rank of the matrix is lowered to it, and said so.

        Raises
        ------
        ValueError
            If `rank` is not in ``[1, min(d_out, d_in)]``.
        """
        if not 1 <= rank <= len(self.energies):
            raise ValueError(f"rank must be in [1, {len(self.energies)}], got {rank}")
        numerical = max(1, int((self.energies > RANK_TOLERANCE * self.energies[0]).sum()))
        fallback = self.fallback
        if rank > numerical:
            note = f"rank lowered from {rank} to {numerical}, the numerical rank of the weight"
            fallback, rank = "; ".join(filter(None, [fallback, note])), numerical
        B, A = self.B[:, :rank], self.A[:rank]  # [d_out, rank], [rank, d_in]
        lengths = A.norm(dim=1) / B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny)
        scale = torch.where(lengths > 0, lengths, 1).sqrt()  # [rank]
        return Factors(B * scale, A / scale[:, None], self.tail(rank), fallback)


def spectrum(W: Tensor, H: Tensor | None = None, *, damp: float = 0.0) -> Spectrum:
    """Decompose a weight under the metric of its inputs.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        Weight of a linear layer, ``y = x @ W.T``.
    H : Tensor, shape [d_in, d_in], optional
        Second moment of the inputs. Left out, every direction counts the same: plain SVD.
    damp : float
        Fraction of ``mean(diag(H))`` added to its diagonal.

    Returns
    -------
    Spectrum
        In float64, on the device of `W`.

    Notes
    -----
    With ``M = W L`` and ``L @ L.T = H`` (damped):

    * d_out <= d_in: eigenvectors U of ``M M^T = W H W^T`` give ``B = U`` and ``A = U^T W``. The
      metric's factor L cancels, so no Cholesky and no inverse is needed at all.
    * d_out > d_in: eigenvectors V of ``M^T M = L^T W^T W L`` give ``B = W L V`` and
      ``A = V^T L^{-1}``.
    """
    W = W.double()
    d_out, d_in = W.shape
    H = None if H is None else H.double()
    if H is not None and not H.diagonal().any():
        return _with_note(spectrum(W), "inputs were all zero; plain SVD")
    if d_out <= d_in:
        M = W @ W.T if H is None else W @ damped(H, damp) @ W.T  # [d_out, d_out]
        energies, U = descending_eigh(M)
        return Spectrum(energies, B=U, A=U.T @ W)
    if H is None:
        energies, V = descending_eigh(W.T @ W)  # [d_in, d_in]
        return Spectrum(energies, B=W @ V, A=V.T.contiguous())
    L, fallback = whitening_factor(H, damp)
    WL = W @ L  # [d_out, d_in]
    energies, V = descending_eigh(WL.T @ WL)  # [d_in, d_in]
    return Spectrum(energies, B=WL @ V, A=torch.linalg.solve(L.T, V).T, fallback=fallback)


def _with_note(result: Spectrum, note: str) -> Spectrum:
    return Spectrum(result.energies, result.B, result.A, note)
