"""The weighted squared error ``tr(G E H E^T)`` that compression minimizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import damped, whitening_factor
from lrc.compressors.solvers.moments import Moment, without_empty


@dataclass(frozen=True)
class Metric:
    """The weights of ``tr(G E H E^T)`` for errors E [d_out, d_in]; None is the identity."""

    H: Tensor | None = None
    """[d_in, d_in], of the inputs."""
    G: Tensor | None = None
    """[d_out, d_out], of the outputs; or [d_out], its diagonal, if the rest is zero."""

    def __call__(self, E: Tensor) -> Tensor:
        """Return ``G @ E @ H``."""
        E = E if self.H is None else E @ self.H  # [d_out, d_in]
        if self.G is None:
            return E
        return self.G @ E if self.G.ndim == 2 else self.G[:, None] * E

    def energy(self, E: Tensor) -> Tensor:
        """Return ``tr(G E H E^T)``, at least 0.

        Errors that a singular metric does not weigh, such as that of inputs of rank one, sum to
        rounding errors of either sign.
        """
        return (E * self(E)).sum().clamp(min=0)

    def diagonals(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the diagonals of G [d_out, 1] and H [d_in], for errors like `W`."""
        left = W.new_ones(W.shape[0]) if self.G is None else self.G
        right = W.new_ones(W.shape[1]) if self.H is None else self.H.diagonal()
        return (left if left.ndim == 1 else left.diagonal())[:, None], right

    def scaled(self, left: Tensor, right: Tensor) -> "Metric":
        """Return the metric of ``left * E * right``, for `left` [d_out, 1] and `right` [d_in]."""
        H, G = self.H, self.G
        if H is not None:
            H = H / right / right[:, None]
        if G is not None:
            G = G / left[:, 0] / (left if G.ndim == 2 else left[:, 0])
        return Metric(H, G)

    def inverse(self, damp: float) -> tuple["Metric", str | None]:
        """Invert both matrices, each with `damp` times its mean diagonal added; note fallbacks."""
        sides: list[Tensor | None] = []
        notes = []
        for name, M in (("inputs", self.H), ("gradients", self.G)):
            if M is None or M.ndim == 1:
                sides.append(None if M is None else 1 / (M + damp * M.mean()))
                continue
            L, note = whitening_factor(M, damp)
            sides.append(torch.cholesky_inverse(L))
            if note is not None:
                notes.append(f"{name}: {note}")
        return Metric(*sides), "; ".join(notes) or None

    def to(self, dtype: torch.dtype) -> "Metric":
        """Return the same metric in another dtype."""
        return Metric(*(None if M is None else M.to(dtype) for M in (self.H, self.G)))


def damped_metric(
    inputs: Moment | None, gradients: Moment | None, damp: float = 0.0, gradient_damp: float = 0.0
) -> tuple[Metric, str | None]:
    """Build the metric of the moments H of inputs and G of gradients, and describe any fallback.

    H needs `full`; of a G without `full` the diagonal is used. `damp` and `gradient_damp` are the
    fractions of ``mean(diag(H))`` and ``mean(diag(G))`` added to their diagonals.

    Raises
    ------
    ValueError
        If `inputs` has no `full`.
    """
    inputs, gradients, notes = without_empty(inputs, gradients)
    H = None if inputs is None else damped(inputs.whole(), damp)
    G = None
    if gradients is not None and gradients.full is not None:
        G = damped(gradients.whole(), gradient_damp)
    elif gradients is not None:
        G = gradients.diagonal.double()
        G = G + gradient_damp * G.mean()
    return Metric(H, G), "; ".join(notes) or None


def weighted_energy(
    W: Tensor, inputs: Moment | None = None, gradients: Moment | None = None, **damping: float
) -> float:
    """Return ``tr(G W H W^T)`` of `W` [d_out, d_in]; the others are those of `damped_metric`."""
    return float(damped_metric(inputs, gradients, **damping)[0].energy(W.double()))
