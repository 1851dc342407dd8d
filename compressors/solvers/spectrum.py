"""The best low-rank approximation of a weight under two metrics, for all ranks at once.

The rank-r minimizer of ``||K^T (W - W_hat) L||_F`` is the truncated SVD of ``K^T W L`` with the
metrics divided out again (Eckart-Young). No SVD is computed: the eigenvectors of the smaller of the
two Gram matrices of ``K^T W L`` give the same subspace.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.factor_balancing import equalize_norms
from lrc.compressors.solvers.linalg import descending_eigh, numerical_rank, whitening_factor
from lrc.compressors.solvers.moments import Moment, without_empty


@dataclass(frozen=True)
class Factors:
    """A weight as a product, ``W_hat = B @ A``."""

    B: Tensor
    """[d_out, rank]"""
    A: Tensor
    """[rank, d_in], applied first."""
    relative_error: float
    fallback: str | None = None

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Spectrum:
    """The singular values and vectors of a weight under its metrics, ready for any rank."""

    energies: Tensor
    """[min(d_out, d_in)], squared singular values of ``K^T W L`` in descending order."""
    B: Tensor
    """[d_out, min(d_out, d_in)], left vectors; ``B @ A == W``."""
    A: Tensor
    """[min(d_out, d_in), d_in], right vectors."""
    fallback: str | None = None
    mean: Tensor | None = None
    """[d_in], the input whose output a bias is to restore at every rank, if any."""

    def tail_energy(self, rank: int) -> float:
        """Return the squared error at a rank: the sum of the energies after it."""
        return float(self.energies[rank:].sum())

    def tail(self, rank: int) -> float:
        """Return the squared error at a rank as a fraction of the energy of W, in [0, 1]."""
        total = self.tail_energy(0)
        return self.tail_energy(rank) / total if total > 0 else 0.0

    def truncate(self, rank: int) -> Factors:
        """Return the best approximation of a rank, with factors of equal column and row norms.

        A rank above the numerical rank of the weight is lowered to it, which `fallback` reports.

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
        B, A = equalize_norms(self.B[:, :rank], self.A[:rank])
        return Factors(B, A, self.tail(rank), fallback)


def spectrum(
    W: Tensor,
    inputs: Moment | None = None,
    gradients: Moment | None = None,
    *,
    damp: float = 0.0,
    gradient_damp: float = 0.0,
) -> Spectrum:
    """Decompose a weight under the metrics of its inputs and of its output gradients.

    Minimizes ``||K^T (W - W_hat) L||_F`` at every rank, with ``L @ L.T == H`` and ``K @ K.T == G``,
    both damped.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
    inputs, gradients : Moment, optional
        Second moments ``H`` of the inputs and ``G`` of the loss gradients at the output. Default:
        the identity.
    damp, gradient_damp : float
        Fraction of ``mean(diag(H))``, ``mean(diag(G))`` added to the diagonal.

    Raises
    ------
    ValueError
        If the moment of the shorter side of `W` has no `full`.

    Notes
    -----
    For d_out <= d_in, the eigenvectors V of ``S = K^T (W H W^T) K`` give ``B = K^{-T} V`` and
    ``A = (K V)^T W``; L cancels, so the metric of the longer side is never factored. A taller
    weight is solved transposed, with the metrics exchanged: ``B = W (L V)`` and ``A = V^T L^{-1}``.
    K and L are Cholesky factors; the symmetric roots of the papers differ from them by a rotation,
    which changes neither the error nor its minimizer.
    """
    S, K, fallback = _near_gram(W, inputs, gradients, damp, gradient_damp)
    transposed = W.shape[0] > W.shape[1]
    W = (W.T if transposed else W).double()  # [d_near, d_far]
    energies, V = descending_eigh(S)
    near, far = V, V.T @ W  # [d_near, d_near], [d_near, d_far]
    if K is not None:
        near = torch.linalg.solve_triangular(K.T, V, upper=True)
        far = (K @ V).T @ W
    B, A = (far.T, near.T) if transposed else (near, far)
    return Spectrum(energies, B=B, A=A, fallback=fallback)


def energies_only(
    W: Tensor, inputs: Moment | None = None, gradients: Moment | None = None, **damping: float
) -> Tensor:
    """Return the energies [min(d_out, d_in)] of `spectrum`, without vectors, in less time."""
    S, _, _ = _near_gram(W, inputs, gradients, **damping)
    energies: Tensor = torch.linalg.eigvalsh((S + S.T) / 2)
    return energies.flip(0).clamp_min(0)


def _near_gram(
    W: Tensor,
    inputs: Moment | None,
    gradients: Moment | None,
    damp: float = 0.0,
    gradient_damp: float = 0.0,
) -> tuple[Tensor, Tensor | None, str | None]:
    """Return the Gram matrix S and the factor K of the shorter side, both [d_near, d_near].

    The energies are the eigenvalues of S; K is None without a metric. Any fallback is described.
    """
    inputs, gradients, notes = without_empty(inputs, gradients)
    W = W.double()
    name, near, near_damp, far, far_damp = "gradients", gradients, gradient_damp, inputs, damp
    if W.shape[0] > W.shape[1]:
        W = W.T
        name, near, near_damp, far, far_damp = "inputs", inputs, damp, gradients, gradient_damp
    K = None
    S = W @ W.T if far is None else far.through(W, far_damp)  # [d_near, d_near]
    if near is not None:
        K, note = whitening_factor(near.whole(), near_damp)
        S = K.T @ S @ K
        if note is not None:
            notes.append(f"{name}: {note}")
    return S, K, "; ".join(notes) or None
