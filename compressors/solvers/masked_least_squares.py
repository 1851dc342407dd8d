"""Least squares on a mask: the best values for the entries that a sparse weight keeps.

With ``E = W - W_hat`` the error is ``tr(G E H E^T)``. Its unknowns are the kept entries of E, while
the removed ones are W itself. Two ways by conjugate gradients, both nothing but matrix products:

* `masked_least_squares` walks over the kept entries. The error only falls, and H and G may be
  singular, but real spectra make it slow: on power laws 40 steps are still at twice the optimum.
* `released_error` walks over the multipliers ``L = G E H``, which are zero wherever an entry is
  kept and solve ``G^-1 L H^-1 == W`` on the removed ones. What is flat in the metric is steep in
  the inverse, and fewer entries are removed than kept: 8 steps come within 2 to 15 % of the
  optimum, 16 within 1 %. The multipliers also say what keeping a removed entry would gain.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import whitening_factor


@dataclass(frozen=True)
class Metric:
    """The two sides of an error ``tr(G E H E^T)``; a side that is None is the identity.

    `H` is [d_in, d_in]; `G` is [d_out, d_out], or [d_out] where only its diagonal is known.
    """

    H: Tensor | None = None
    G: Tensor | None = None

    def __call__(self, E: Tensor) -> Tensor:
        """Return ``G @ E @ H``."""
        E = E if self.H is None else E @ self.H  # [d_out, d_in]
        if self.G is None:
            return E
        return self.G @ E if self.G.ndim == 2 else self.G[:, None] * E

    def energy(self, E: Tensor) -> Tensor:
        """Return ``tr(G E H E^T)``."""
        return (E * self(E)).sum()

    def diagonals(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the diagonals of G, as a column, and of H: [d_out, 1] and [d_in]."""
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
        """Return the metric of the inverses, after `damp` of the mean diagonal was added."""
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


def masked_least_squares(
    W: Tensor, metric: Metric, mask: Tensor, start: Tensor, *, steps: int
) -> Tensor:
    """Lower ``tr(G (W - X) H (W - X)^T)`` over the entries of X that `mask` keeps.

    Conjugate gradients, preconditioned by the diagonals; no step raises the error.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
    metric : Metric
        In the dtype of `W`; may be singular.
    mask : Tensor, shape [d_out, d_in]
        True where X may be non-zero.
    start : Tensor, shape [d_out, d_in]
        Where to begin; read on the mask only.
    steps : int
        One application of the metric each.

    Returns
    -------
    Tensor, shape [d_out, d_in]
        Exactly zero outside the mask.
    """
    left, right = metric.diagonals(W)
    unit = left * right  # [d_out, d_in]
    inverse = torch.where(mask & (unit > 0), 1 / unit, 0)
    X = torch.where(mask, start, 0)
    R = metric(W - X)  # what is outside the mask the preconditioner drops
    Z = inverse * R
    D, size = Z, (R * Z).sum()
    for _ in range(steps):
        moved = metric(D)
        step = _ratio(size, (D * moved).sum())
        X = X + step * D
        R = R - step * moved
        Z = inverse * R
        before, size = size, (R * Z).sum()
        D = Z + _ratio(size, before) * D
    return X


def released_error(
    W: Tensor, inverse: Metric, mask: Tensor, start: Tensor, *, steps: int
) -> tuple[Tensor, Tensor]:
    """Find the error that a mask forces, with the kept entries free to make up for the removed.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
    inverse : Metric
        The inverses of G and H, in the dtype of `W`.
    mask : Tensor, shape [d_out, d_in]
        True where an entry is kept.
    start : Tensor, shape [d_out, d_in]
        Multipliers to begin with, zeros if none are known; read outside the mask only.
    steps : int
        One application of the inverses each, beyond the one that `start` costs.

    Returns
    -------
    multipliers : Tensor, shape [d_out, d_in]
        ``G @ E @ H``, zero on the mask.
    error : Tensor, shape [d_out, d_in]
        ``E = W - W_hat``, equal to `W` outside the mask.
    """
    left, right = inverse.diagonals(W)
    unit = left * right  # [d_out, d_in]
    multipliers = torch.where(mask, 0, start)
    E = inverse(multipliers)
    R = torch.where(mask, 0, W - E)
    Z = R / unit
    D, size = Z, (R * Z).sum()
    for _ in range(steps):
        moved = inverse(D)
        step = _ratio(size, (D * moved).sum())
        multipliers = multipliers + step * D
        E = E + step * moved
        R = torch.where(mask, 0, W - E)
        Z = R / unit
        before, size = size, (R * Z).sum()
        D = Z + _ratio(size, before) * D
    return multipliers, torch.where(mask, E, W)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide, without waiting for a GPU to say whether a search has come to its end."""
    return torch.where(b > 0, a / b, 0)
