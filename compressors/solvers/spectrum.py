"""The one solver behind the SVD family: the best low-rank approximation under two metrics.

The rank-r minimiser of ``||K^T (W - W_hat) L||_F`` is the truncated SVD of ``K^T W L`` with the
metrics taken off again (Eckart-Young). No SVD is computed: the eigenvectors of the smaller of the
two Gram matrices of ``K^T W L`` give the same subspace. The metric of the longer side is never
factored, it only appears as seen through the weight, and nothing larger than ``min(d_out, d_in)``
is decomposed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import (
    descending_eigh,
    descending_eigvalsh,
    numerical_rank,
    whitening_factor,
)
from lrc.compressors.solvers.moments import Moment


@dataclass(frozen=True)
class Factors:
    """A weight as a product, ``W_hat = B @ A``, and what it costs in quality.

    `B` is [d_out, rank], `A` is [rank, d_in] and is applied first. `loss` is the share of the
    weighted energy of W that is lost, in [0, 1]; `fallback` says what had to deviate from the
    request, None if nothing. `bias` [d_out], where the method has one, is to be added to the
    layer's own.
    """

    B: Tensor
    A: Tensor
    loss: float
    fallback: str | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Spectrum:
    """The energies of a weight under its metrics, largest first, ready to be cut at any rank.

    `energies` [min(d_out, d_in)] are the squared singular values of ``K^T W L``; the tail beyond
    a rank is the squared error of that rank: the rate-distortion curve of the matrix. `B` and `A`
    hold all components in order, `B @ A == W`. `mean` [d_in], if given, is the input whose output
    every cut keeps by a bias.
    """

    energies: Tensor
    B: Tensor
    A: Tensor
    fallback: str | None = None
    mean: Tensor | None = None

    def tail_energy(self, rank: int) -> float:
        """Return the energy that a cut at `rank` loses: ``||K^T (W - W_hat) L||_F^2``."""
        return float(self.energies[rank:].sum())

    def tail(self, rank: int) -> float:
        """Return the share of the energy that a cut at `rank` loses, in [0, 1]."""
        total = self.tail_energy(0)
        return self.tail_energy(rank) / total if total > 0 else 0.0

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
        numerical = max(1, numerical_rank(self.energies))
        fallback = self.fallback
        if rank > numerical:
            note = f"rank lowered from {rank} to {numerical}, the numerical rank of the weight"
            fallback, rank = "; ".join(filter(None, [fallback, note])), numerical
        B, A = self.B[:, :rank], self.A[:rank]  # [d_out, rank], [rank, d_in]
        lengths = A.norm(dim=1) / B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny)
        scale = torch.where(lengths > 0, lengths, 1).sqrt()  # [rank]
        bias = None if self.mean is None else self.B[:, rank:] @ (self.A[rank:] @ self.mean)
        return Factors(
            (B * scale).contiguous(),
            (A / scale[:, None]).contiguous(),
            self.tail(rank),
            fallback,
            bias,
        )


def spectrum(
    W: Tensor,
    inputs: Moment | None = None,
    gradients: Moment | None = None,
    *,
    damp: float = 0.0,
    gradient_damp: float = 0.0,
) -> Spectrum:
    """Decompose a weight under the metrics of its inputs and of its output gradients.

    Minimises ``||K^T (W - W_hat) L||_F`` at every rank, with ``L @ L.T == H`` and
    ``K @ K.T == G``, both damped.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        Weight of a linear layer, ``y = x @ W.T``.
    inputs : Moment, optional
        Second moment ``H`` of the inputs. Left out, every input direction counts the same.
    gradients : Moment, optional
        Second moment ``G`` of the loss gradients at the output. Left out, every output direction
        counts the same.
    damp, gradient_damp : float
        Fraction of ``mean(diag(H))``, ``mean(diag(G))`` added to the diagonal.

    Returns
    -------
    Spectrum
        In float64, on the device of `W`.

    Raises
    ------
    ValueError
        If the shorter side of `W` has only the image of its moment.

    Notes
    -----
    For d_out <= d_in: eigenvectors V of ``S = K^T (W H W^T) K`` give ``B = K^{-T} V`` and
    ``A = (K V)^T W``. L cancels: no root of H is ever taken. A taller weight is solved transposed,
    where the two metrics change places: ``B = W (L V)`` and ``A = V^T L^{-1}``. K and L are
    Cholesky factors; the symmetric roots of the papers differ from them by a rotation, which
    changes neither the error nor its minimiser.
    """
    problem = _problem(W, inputs, gradients, damp, gradient_damp)
    energies, V = descending_eigh(problem.S)
    near, far = V, V.T @ problem.W  # [d_near, d_near], [d_near, d_far]
    if problem.K is not None:
        near = torch.linalg.solve_triangular(problem.K.T, V, upper=True)
        far = (problem.K @ V).T @ problem.W
    B, A = (far.T, near.T) if problem.transposed else (near, far)
    return Spectrum(energies, B=B, A=A, fallback=problem.fallback)


def energies_only(
    W: Tensor,
    inputs: Moment | None = None,
    gradients: Moment | None = None,
    *,
    damp: float = 0.0,
    gradient_damp: float = 0.0,
) -> Tensor:
    """Return the energies of `spectrum` without its vectors, at a fraction of the time.

    Returns
    -------
    Tensor, shape [min(d_out, d_in)]
        Largest first, float64.
    """
    return descending_eigvalsh(_problem(W, inputs, gradients, damp, gradient_damp).S)


@dataclass(frozen=True)
class _Problem:
    """A weight turned so that its shorter side, the near one, comes first.

    `W` [d_near, d_far]; `K` [d_near, d_near] is the factor of the near metric, None if there is
    none; `S` [d_near, d_near] the matrix whose eigenvalues are the energies.
    """

    W: Tensor
    transposed: bool
    K: Tensor | None
    S: Tensor
    fallback: str | None


def _problem(
    W: Tensor,
    inputs: Moment | None,
    gradients: Moment | None,
    damp: float,
    gradient_damp: float,
) -> _Problem:
    notes = []
    if inputs is not None and inputs.empty:
        inputs = None
        notes.append("inputs were all zero; left out of the metric")
    if gradients is not None and gradients.empty:
        gradients = None
        notes.append("gradients were all zero; left out of the metric")
    W = W.double()
    transposed = W.shape[0] > W.shape[1]
    name, near, near_damp, far, far_damp = "gradients", gradients, gradient_damp, inputs, damp
    if transposed:
        W = W.T
        name, near, near_damp, far, far_damp = "inputs", inputs, damp, gradients, gradient_damp
    K = None
    S = W @ W.T if far is None else far.through(W, far_damp)  # [d_near, d_near]
    if near is not None:
        K, note = whitening_factor(near.whole(), near_damp)
        S = K.T @ S @ K
        if note is not None:
            notes.append(f"{name}: {note}")
    return _Problem(W, transposed, K, S, "; ".join(notes) or None)
