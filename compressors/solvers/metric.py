"""The weighted squared error ``tr(G E H E^T)`` that compression minimizes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import damped, inverse_of_factored_, whitening_factor
from lrc.compressors.solvers.moments import Moment, without_empty


@dataclass(frozen=True)
class Metric:
    """The weights of ``tr(G E H E^T)`` for errors E [d_out, d_in]; None is the identity.

    Or those of a stack of errors [n, d_out, d_in]; H and G then have the same first dimension, and
    G is not a diagonal.
    """

    H: Tensor | None = None
    """[d_in, d_in], of the inputs."""
    G: Tensor | None = None
    """[d_out, d_out], of the outputs; or [d_out], its diagonal, if the rest is zero."""

    def __call__(self, E: Tensor) -> Tensor:
        """Return ``G @ E @ H``."""
        E = E if self.H is None else E @ self.H  # [d_out, d_in]
        if self.G is None:
            return E
        return self.G[:, None] * E if self.G.ndim == 1 else self.G @ E

    def energy(self, E: Tensor) -> Tensor:
        """Return ``tr(G E H E^T)``, at least 0, for each matrix of a stack.

        Errors that a singular metric does not weigh, such as that of inputs of rank one, sum to
        rounding errors of either sign.
        """
        return (E * self(E)).sum(dim=(-2, -1)).clamp(min=0)

    def diagonals(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the diagonals of G [..., d_out, 1] and H [..., 1, d_in], for errors like `W`."""
        left = W.new_ones(W.shape[-2]) if self.G is None else self.G
        left = left if left.ndim == 1 else left.diagonal(dim1=-2, dim2=-1)
        right = W.new_ones(W.shape[-1])
        if self.H is not None:
            right = self.H.diagonal(dim1=-2, dim2=-1)
        return left[..., :, None], right[..., None, :]

    def scaled(self, left: Tensor, right: Tensor) -> "Metric":
        """Return the metric of ``left * E * right``, for vectors like those of `diagonals`."""
        H, G = self.H, self.G
        if H is not None:
            H = (H / right).div_(right.mT)  # one copy of what may be the largest matrix
        if G is not None:
            G = G / left[:, 0] / left[:, 0] if G.ndim == 1 else (G / left.mT).div_(left)
        return Metric(H, G)

    def of_rows(self, rows: slice) -> "Metric":
        """Return the metric of errors that are zero in all other rows."""
        if self.G is None:
            return self
        return Metric(self.H, self.G[rows] if self.G.ndim == 1 else self.G[..., rows, rows])

    def inverse(self, damp: float, dtype: torch.dtype) -> tuple["Metric", str | None]:
        """Invert both matrices, each with `damp` times its mean diagonal added; note fallbacks.

        The inverses are computed in the dtype of the matrices and returned in `dtype`.
        """
        sides: list[Tensor | None] = []
        notes = []
        for name, M in (("inputs", self.H), ("gradients", self.G)):
            if M is None or M.ndim == 1:
                sides.append(None if M is None else (1 / (M + damp * M.mean())).to(dtype))
                continue
            inverses = []
            for each in M.reshape(-1, *M.shape[-2:]):
                L, note = whitening_factor(each, damp)
                inverses.append(inverse_of_factored_(L, dtype))
                if note is not None:
                    notes.append(f"{name}: {note}")
            sides.append(inverses[0] if M.ndim == 2 else torch.stack(inverses))
        return Metric(*sides), "; ".join(dict.fromkeys(notes)) or None

    def laid_out(self) -> "Metric":
        """Return the metric with the strides for which products are fastest on a GPU.

        The matrices are symmetric, so that their transposes are equal. In TF32, for which this was
        measured, products of an error [14336, 4096] take 4.4 instead of 6.7 ms with a G in rows,
        and 1.2 instead of 1.4 ms with an H in columns (H200).
        """

        def strided(M: Tensor | None, *, by_rows: bool) -> Tensor | None:
            if M is None or M.ndim == 1 or not M.is_cuda or (M.stride(-1) == 1) == by_rows:
                return M
            return M.mT

        return Metric(strided(self.H, by_rows=False), strided(self.G, by_rows=True))

    def to(self, dtype: torch.dtype) -> "Metric":
        """Return the same metric in another dtype."""
        return Metric(*(None if M is None else M.to(dtype) for M in (self.H, self.G)))


def stacked(metrics: Sequence[Metric]) -> Metric | None:
    """Return the metric of a stack of errors; None if one of them lacks a whole matrix."""
    H, G = [each.H for each in metrics], [each.G for each in metrics]
    if not all(M is not None and M.ndim == 2 for M in (*H, *G)):
        return None
    return Metric(torch.stack(H), torch.stack(G))  # type: ignore[arg-type]


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
