"""Choose the channels that an MLP keeps, and refit the linear that reads them.

Everything is computed from the second moment C over tokens of the channels between the linears of
an MLP (``act(gate) * up`` or ``act(fc1)``). The cost of removing a channel is the exact increase of
the output's squared error under C, once all remaining weights have been refitted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import damped, weighted_error, whitening_factor

# Fraction of the channels removed between two updates of all others. On SmolLM2-135M the lost
# energy agrees to 1e-4 for 1/16, 1/128 and one channel at a time.
BATCH_FRACTION = 1 / 32


@dataclass(frozen=True)
class Narrowed:
    """An MLP's output linear on fewer channels."""

    kept: Tensor
    """Channels [width], ascending."""
    W: Tensor
    """Refitted weight of the output linear, [d, width], in float64."""
    lost: float
    """Fraction of the output energy ``tr(W C W^T)`` that is lost, in [0, 1]."""
    fallback: str | None = None
    """Deviation from the requested computation; None if there was none."""


def narrow(W: Tensor, C: Tensor, width: int, *, damp: float) -> Narrowed:
    """Choose channels by backward elimination and refit the linear that reads them.

    Each step removes the channels whose removal costs least after an optimal refit of the others.

    Parameters
    ----------
    W : Tensor, shape [d, d_int]
        Weight of the output linear.
    C : Tensor, shape [d_int, d_int]
        Second moment of its inputs, summed or averaged over tokens.
    width : int
        Number of channels to keep, in ``[1, d_int]``.
    damp : float
        Fraction of ``mean(diag(C))`` added to its diagonal; positive.

    Notes
    -----
    With ``Q = C^-1``, removing the channels B from a weight V that is optimal on all others costs
    ``tr(V_B (Q_BB)^-1 V_B^T)``, for one channel ``||v_j||^2 / q_jj`` (the saliency of [1]_ for
    columns), and leaves ``V - V_B (Q_BB)^-1 Q_B:`` and ``Q - Q_:B (Q_BB)^-1 Q_B:``. A batch of
    channels is removed one at a time from twice as many of the cheapest candidates; all other
    channels are updated exactly once per batch.

    MoDeGPT and UniQL select by ridge leverage, ``diag(C (C + r I)^-1)``, which ignores W: on
    SmolLM2-135M with 1016 of 1536 channels it loses up to a sixth more energy, with perplexity
    45.3 instead of 43.4. The refit is theirs (Nystrom), but uses the whole damped moment: channels
    that no token has used keep their weight, and at full width W does not change.

    References
    ----------
    .. [1] B. Hassibi and D. Stork, "Second order derivatives for network pruning: Optimal Brain
       Surgeon", NeurIPS 1992.
    """
    d_int = W.shape[1]
    if not 1 <= width <= d_int:
        raise ValueError(f"width must be in [1, {d_int}], got {width}")
    W, C = W.double(), C.double()
    if width == d_int:
        return Narrowed(torch.arange(d_int, device=W.device), W.clone(), 0.0)
    if not C.diagonal().any():
        kept = W.square().sum(dim=0).topk(width).indices.sort().values
        return Narrowed(kept, W[:, kept], 0.0, "inputs were all zero; kept the largest weights")
    L, fallback = whitening_factor(C, damp)
    kept, _ = _eliminate(W, torch.cholesky_inverse(L), width)
    V = refit(W, C, kept, damp=damp)
    lost = lost_energy(W, torch.zeros_like(W).index_copy(1, kept, V), C)
    return Narrowed(kept, V, lost, fallback)


def loss_curve(W: Tensor, C: Tensor, *, damp: float) -> Tensor:
    """Return the squared error of the output on 1, 2, ..., d_int channels, chosen as by `narrow`.

    Descending [d_int], in float64, under the damped moment; the last is 0. Pass ``G^(1/2) W`` as W
    to weight errors and choices by G.
    """
    W, C = W.double(), C.double()
    if not C.diagonal().any():
        return W.new_zeros(W.shape[1])
    L, _ = whitening_factor(C, damp)
    _, costs = _eliminate(W, torch.cholesky_inverse(L), 1)
    return torch.cat([costs.new_zeros(1), costs.cumsum(0)]).flip(0)


def refit(W: Tensor, C: Tensor, kept: Tensor, *, damp: float) -> Tensor:
    """Return the weight [d, width] on the kept channels that best reproduces the output of W.

    Minimises ``tr((W - V) C (W - V)^T)`` over V that is zero elsewhere, with C damped.
    """
    C = damped(C.double(), damp)
    L, _ = whitening_factor(C[kept][:, kept], 0.0)
    return torch.cholesky_solve(C[kept] @ W.double().T, L).T


def lost_energy(W: Tensor, W_hat: Tensor, C: Tensor) -> float:
    """Return ``tr(E C E^T) / tr(W C W^T)`` with ``E = W - W_hat``; 0 if the output is zero."""
    total = weighted_error(W, torch.zeros_like(W), C)
    return weighted_error(W, W_hat, C) / total if total > 0 else 0.0


def _eliminate(W: Tensor, Q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the kept channels of W [d, d_int], and the cost of each removed one in order.

    Overwrites Q [d_int, d_int]. Removed channels remain as zeros until they are half of all:
    copying the rest costs more than computing with zeros.
    """
    batch = max(1, int(W.shape[1] * BATCH_FRACTION))
    names = torch.arange(W.shape[1], device=W.device)
    alive = torch.ones_like(names, dtype=torch.bool)
    V, left, costs = W.clone(), len(names), [W.new_zeros(0)]
    while left > width:
        estimates = V.square().sum(dim=0) / Q.diagonal()
        estimates[~alive] = torch.inf
        candidates = estimates.topk(min(2 * batch, left), largest=False).indices
        V_c, Q_cc = V[:, candidates], Q[candidates][:, candidates]
        chosen, batch_costs = _cheapest(V_c.T @ V_c, Q_cc, min(batch, left - width))
        B = candidates[chosen]
        costs.append(batch_costs)
        L, _ = whitening_factor(Q[B][:, B], 0.0)
        rows = torch.cholesky_solve(Q[B], L)  # [n_removed, d_int]
        V -= V[:, B] @ rows
        Q -= Q[:, B] @ rows
        alive[B] = False
        V[:, B], Q[B], Q[:, B] = 0, 0, 0
        Q.diagonal()[B] = 1
        left -= len(B)
        if left < len(alive) / 2:
            V, Q, names, alive = V[:, alive], Q[alive][:, alive], names[alive], alive[alive]
    return names[alive], torch.cat(costs)


def _cheapest(U: Tensor, Q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose `count` channels one at a time; return them and their costs.

    ``U = V^T V`` [n, n] is of the weights of the candidates. Each cost accounts for the channels
    removed before: otherwise channels that can replace each other would all appear dispensable.
    """
    chosen: list[Tensor] = []
    costs: list[Tensor] = []
    removed = torch.zeros(len(U), dtype=U.dtype, device=U.device)
    for _ in range(count):
        cost, j = (U.diagonal() / Q.diagonal() + removed).min(dim=0)
        chosen.append(j)
        costs.append(cost)
        r = Q[j] / Q[j, j]  # V becomes V (I - e_j r^T)
        U = U - torch.outer(r, U[j]) - torch.outer(U[:, j], r) + U[j, j] * torch.outer(r, r)
        Q = Q - torch.outer(Q[:, j], r)
        removed = removed.index_fill(0, j, torch.inf)
        Q = Q.index_put((j, j), Q.new_ones(()))
    return torch.stack(chosen), torch.stack(costs)
