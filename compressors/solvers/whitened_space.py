"""A weight prepared for dictionary learning: whitened, and written in its own eigenbasis.

Atoms live in input space: whitening changes only the dictionary, and the coefficients keep their
zeros. For the same reason the metric of the outputs must be diagonal: it scales the columns of the
coefficients, where a full matrix would mix them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import RANK_TOLERANCE, whitening_factor
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import spectrum

# Lower bound for the weight of an output, as a fraction of the largest: zero would lose its codes.
FLOOR = 1e-12


@dataclass(frozen=True)
class WhitenedSpace:
    """The whitened weight in its eigenbasis: ``basis @ Z == W^T * weights``.

    `basis` and `Z` are zero in directions below the numerical rank.
    """

    W: Tensor
    """[d_out, d_in]"""
    inputs: Moment | None
    damp: float
    basis: Tensor
    """[d_in, dim] with ``dim = min(d_out, d_in)``, orthonormal in the metric of the inputs."""
    Z: Tensor
    """[dim, d_out], float64, orthogonal rows in order of energy."""
    weights: Tensor
    """[d_out], square roots of the damped ``diag(G)``."""
    fallback: str | None

    @classmethod
    def of(
        cls,
        W: Tensor,
        inputs: Moment | None,
        gradients: Moment | None,
        damp: float,
        gradient_damp: float,
    ) -> "WhitenedSpace":
        """Derive the space from the `spectrum` of the weight, which raises the errors."""
        weights = torch.ones(W.shape[0], dtype=torch.float64, device=W.device)
        outputs = gradients
        if gradients is not None and not gradients.empty:
            fisher = gradients.diagonal.double()
            fisher = fisher + gradient_damp * fisher.mean()
            fisher = fisher.clamp_min(FLOOR * fisher.max())
            weights = fisher.sqrt()
            outputs = Moment.weighted(fisher, W.T)
        found = spectrum(W, inputs, outputs, damp=damp)
        kept = found.energies > RANK_TOLERANCE * found.energies[0]
        size = torch.where(kept, found.energies, 1.0).sqrt() * kept  # [dim]
        rows = found.B.T * weights  # [dim, d_out]
        length = torch.where(kept, rows.norm(dim=1), 1.0)
        Z = rows * (size / length)[:, None]
        basis = found.A.T * (length * kept / torch.where(kept, size, 1.0))
        return cls(W, inputs, damp, basis, Z, weights, found.fallback)

    def columns(self, which: Tensor) -> Tensor:
        """Return columns of ``W^T``, taken as whitened vectors, in this basis: [dim, which]."""
        chosen = self.W[which].double().T  # [d_in, which]
        if self.inputs is None or self.inputs.empty:
            return self.basis.T @ chosen
        L, _ = whitening_factor(self.inputs.whole(), self.damp)
        return self.basis.T @ (L @ chosen)  # L^T basis is orthonormal
