"""Least squares on a mask: the best values for the entries that a sparse weight keeps.

The error is ``tr(G E H E^T)`` with ``E = W - W_hat``. There are two ways to minimize it:

* `masked_least_squares` iterates on the kept entries. No step raises the error and H and G may be
  singular, but on power-law spectra the error is still twice the optimum after 40 steps.
* `compensated_error` iterates on the Lagrange multipliers ``L = G E H``, which are zero at the kept
  entries and solve ``G^-1 L H^-1 == W`` at the removed ones. The inverse metric is well conditioned
  in the directions that matter: the error is within 2 to 15 % of the optimum after 8 steps, within
  1 % after 16. The multipliers also give the benefit of keeping a removed entry.

All tensors are [d_out, d_in], or stacks of such matrices, each of which is a problem of its own;
masks are True where an entry is kept.
"""

import torch
from torch import Tensor

from lrc.compressors.solvers.conjugate_gradients import conjugate_gradients
from lrc.compressors.solvers.metric import Metric


def masked_least_squares(
    W: Tensor, metric: Metric, mask: Tensor, start: Tensor, *, steps: int
) -> Tensor:
    """Minimize ``tr(G (W - X) H (W - X)^T)`` over the entries of X that `mask` keeps.

    The metric is in the dtype of `W`; its diagonals are the preconditioner. Of the starting point
    only the entries in the mask are read. X is exactly zero outside the mask.
    """
    left, right = metric.diagonals(W)
    unit = left * right  # [d_out, d_in]
    inverse = torch.where(mask & (unit > 0), 1 / unit, 0)
    X = torch.where(mask, start, 0)
    return conjugate_gradients(
        metric, X, metric(W - X), steps=steps, precondition=lambda R: inverse * R, dim=(-2, -1)
    )[0]


def compensated_error(
    W: Tensor, inverse: Metric, mask: Tensor, start: Tensor, *, steps: int
) -> tuple[Tensor, Tensor]:
    """Compute the least error of a mask: the kept entries compensate for the removed ones.

    `inverse` has the inverses of G and H, in the dtype of `W`. Of `start`, the multipliers to start
    from or zeros, only entries outside the mask are read. Returns the multipliers ``G @ E @ H``,
    zero in the mask, and the error ``E = W - W_hat``, equal to `W` outside the mask.
    """
    left, right = inverse.diagonals(W)
    removed = torch.where(mask, 0, 1 / (left * right))  # [d_out, d_in]
    multipliers = torch.where(mask, 0, start)
    multipliers, kept = conjugate_gradients(
        inverse,
        multipliers,
        W - inverse(multipliers),
        steps=steps,
        precondition=lambda R: removed * R,
        dim=(-2, -1),
    )  # the residual is that of all entries: W - E
    return multipliers, torch.where(mask, W - kept, W)
