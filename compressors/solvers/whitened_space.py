"""A weight made ready for dictionaries of any size: whitened, and turned into its own eigenbasis.

Atoms live in input space: whitening touches the dictionary alone, and the coefficients keep their
zeros. The metric of the outputs has to be diagonal for the same reason: it scales the columns of
the coefficients, where a full one would mix them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import RANK_TOLERANCE, whitening_factor
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import spectrum

# Outputs without gradients keep this share of the largest weight, or their codes would be lost.
FLOOR = 1e-12


@dataclass(frozen=True)
class Space:
    """The whitened weight in its own eigenbasis: ``basis @ Z == W^T * weights``.

    Directions that are rounding alone are zero in `basis` and `Z`.
    """

    W: Tensor
    """[d_out, d_in]"""
    inputs: Moment | None
    damp: float
    basis: Tensor
    """[d_in, dim] with ``dim = min(d_out, d_in)``, orthonormal in the metric of the inputs."""
    Z: Tensor
    """[dim, d_out], float64."""
    weights: Tensor
    """[d_out], the roots of ``diag(G)``, damped."""
    fallback: str | None

    @classmethod
    def of(
        cls,
        W: Tensor,
        inputs: Moment | None,
        gradients: Moment | None,
        damp: float,
        gradient_damp: float,
    ) -> "Space":
        """Read the space off the spectrum: it is that of the best low-rank approximation.

        Raises
        ------
        ValueError
            If the moment of the inputs has to be whole and is not: where d_out >= d_in.
        """
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
        """Project columns of ``W^T``, read as whitened vectors, onto the space: [dim, which]."""
        chosen = self.W[which].double().T  # [d_in, which]
        if self.inputs is None or self.inputs.empty:
            return self.basis.T @ chosen
        L, _ = whitening_factor(self.inputs.whole(), self.damp)
        return self.basis.T @ (L @ chosen)  # the basis is orthonormal once whitened: L^T basis
