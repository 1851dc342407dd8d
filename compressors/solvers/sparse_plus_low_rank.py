"""A weight as a sum, ``W_hat = B @ A + M`` with M sparse, under two metrics.

What many entries have in common is cheap as a product, what few have for themselves as entries. The
two parts are searched together, for each of them alone is a poor start for the other: on
SmolLM2-135M's query projections, pruning to the end and cutting the rest in turns is still 10 %
above after five turns. One round swaps a few entries of M, takes a step of its refit, and a step
towards the best product for what M then leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lrc.compressors.layers import Sizes
from lrc.compressors.solvers.linalg import descending_eigh, whitening_factor
from lrc.compressors.solvers.mask_search import OUTER_STEPS, STEPS_IN_METRIC, Search, State
from lrc.compressors.solvers.masked_least_squares import Metric, masked_least_squares
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.pruning import damped_metric

# Rounds with swaps and, after them, without; and those of an allocation, at every size. Half of the
# rounds leave 5 to 8 % more error on SmolLM2-135M's query projections, a third 10 to 18 %.
ROUNDS, LAST_ROUNDS = 24, 6
CURVE_ROUNDS, CURVE_LAST_ROUNDS = 10, 2
# Swaps of the first round as a share of what is removed, and what is left of it a round later.
SWAPS, SWAPS_DECAY, CURVE_DECAY = 0.1, 0.85, 0.75
# A product is searched among twice its rank of directions and some more: a step then comes close to
# the truncated spectrum, without an eigenproblem larger than that.
DIRECTIONS, MORE_DIRECTIONS = 2, 8
START_STEPS = 3
# The share of the last step of the product that is taken once more before M answers to it: none
# leaves up to 6 % more error on query projections, 0.8 up to 11 % more on output projections.
MOMENTUM = 0.5


@dataclass(frozen=True)
class Sum:
    """A product and entries beside it, in float64, and what their sum costs in quality."""

    B: Tensor
    """[d_out, rank]"""
    A: Tensor
    """[rank, d_in]"""
    M: Tensor
    """[d_out, d_in], exactly zero outside the mask."""
    mask: Tensor
    """[d_out, d_in], bool, True where an entry is kept."""
    energy: float
    """``tr(G E H E^T)`` with ``E = W - B @ A - M`` under the damped metrics."""
    loss: float
    """Share of the weighted energy of W that is lost, in [0, 1]."""
    fallback: str | None = None


@dataclass(frozen=True)
class _Stand:
    """Where a search stands, in its units: the sparse part, and the directions of the product."""

    state: State
    B: Tensor
    rows: Tensor
    """[directions, d_in], those of the product first: ``A`` is the first of them."""
    rest: Tensor
    """[d_out, d_in], what the sparse part leaves for the product: W itself outside the mask."""
    energy: float

    @property
    def low(self) -> Tensor:
        return self.B @ self.rows[: self.B.shape[1]]


@dataclass(frozen=True)
class SumProblem:
    """A weight made ready for sums of any sizes."""

    W: Tensor
    metric: Metric
    search: Search
    total: float
    """The weighted energy of W."""
    fallback: str | None

    @classmethod
    def of(
        cls,
        W: Tensor,
        inputs: Moment | None = None,
        gradients: Moment | None = None,
        *,
        damp: float = 0.0,
        gradient_damp: float = 0.0,
    ) -> Self:
        """Damp and invert the metrics.

        Parameters
        ----------
        W : Tensor, shape [d_out, d_in]
            Weight of a linear layer, ``y = x @ W.T``.
        inputs, gradients, damp, gradient_damp
            As for `prune`.
        """
        W = W.double()
        metric, note = damped_metric(inputs, gradients, damp, gradient_damp)
        search = Search.of(W, metric, "unstructured")
        fallback = "; ".join(filter(None, [note, search.fallback])) or None
        return cls(W, metric, search, float(metric.energy(W)), fallback)

    def solve(self, *, rank: int, nonzeros: int) -> Sum:
        """Find the product of a rank and the entries beside it that lose least together.

        Raises
        ------
        ValueError
            If a size is out of range.

        Notes
        -----
        The search is in float32, as `prune` does it; the best of its rounds is refitted in float64.
        """
        self._check(rank, nonzeros)
        shares = _shares(SWAPS_DECAY, ROUNDS, LAST_ROUNDS)
        best = self._searched(None, rank, nonzeros, shares)
        search, mask = self.search, best.state.mask
        M = torch.where(mask, self.W - search.unscaled(best.rest), 0)
        rows = best.rows.double() / search.unit[:1]  # but for a factor
        B, rows = towards_best(self.W - M, self.metric, rows, rank)
        A = rows[:rank]
        M = masked_least_squares(self.W - B @ A, self.metric, mask, M, steps=STEPS_IN_METRIC)
        energy = float(self.metric.energy(self.W - B @ A - M))
        loss = min(1.0, energy / self.total) if self.total > 0 else 0.0
        return Sum(B, A, M, mask, energy, loss, self.fallback)

    def curve(self, sizes: Sequence[Sizes]) -> list[float]:
        """Return about the energies that `solve` loses at several sizes, at a fraction of the time.

        Each is searched from the one before, if that is no smaller. Above those of `solve`, as are
        those of `prune_curve` above those of `prune`: by 1 to 7 % where half of the bits or less
        are kept, 8 to 13 % at 0.8 of them, a third at 0.95.

        Raises
        ------
        ValueError
            If a size is out of range.
        """
        now: _Stand | None = None
        energies = []
        shares = _shares(CURVE_DECAY, CURVE_ROUNDS, CURVE_LAST_ROUNDS)
        for each in sizes:
            rank, nonzeros = each["rank"], each["nonzeros"]
            self._check(rank, nonzeros)
            smaller = now is None or now.state.count < nonzeros or now.B.shape[1] < rank
            now = self._searched(None if smaller else now, rank, nonzeros, shares)
            E = self.search.unscaled(now.rest - now.low)
            energies.append(float(self.metric.energy(E)))
        return energies

    def _searched(
        self, start: _Stand | None, rank: int, nonzeros: int, shares: Sequence[float]
    ) -> _Stand:
        """Go one round for every share of swaps, and return the best stand that was seen."""
        search, metric = self.search, self.search.metric
        if start is None:
            start = self._first(rank, nonzeros)
        state, rows = start.state, start.rows
        rows = rows[: directions(rank, *search.W.shape)]
        low = before = start.B[:, :rank] @ rows[:rank]
        best: _Stand | None = None
        for share in shares:
            ahead = low + MOMENTUM * (low - before)
            state = search.beside(ahead).swapped(state, nonzeros, share)
            rest = torch.where(state.mask, ahead + state.error, search.W)
            B, rows = towards_best(rest, metric, rows, rank)
            before, low = low, B @ rows[:rank]
            now = _Stand(state, B, rows, rest, float(metric.energy(rest - low)))
            best = now if best is None else min(best, now, key=lambda one: one.energy)
        assert best is not None
        return best

    def _first(self, rank: int, nonzeros: int) -> _Stand:
        """Prune without swaps, and start from the directions of the largest errors of outputs."""
        search = self.search
        state = search.swapped(search.dense(), nonzeros, 0.0, OUTER_STEPS)
        moved = search.metric(state.error)
        largest = moved.norm(dim=1).topk(directions(rank, *search.W.shape)).indices
        rows = state.error[largest]  # [directions, d_in]
        for _ in range(START_STEPS):
            B, rows = towards_best(state.error, search.metric, rows, rank)
        return _Stand(state, B, rows, state.error, state.energy)

    def _check(self, rank: int, nonzeros: int) -> None:
        shape = list(self.W.shape)
        limits = {"rank": (rank, min(shape)), "nonzeros": (nonzeros, self.W.numel())}
        for name, (size, most) in limits.items():
            if not 1 <= size <= most:
                raise ValueError(f"{name} must be in [1, {most}] for a weight {shape}, got {size}")


def towards_best(X: Tensor, metric: Metric, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Take one step of subspace iteration to the best product of a rank under two metrics.

    Parameters
    ----------
    X : Tensor, shape [d_out, d_in]
    metric : Metric
        In the dtype of `X`.
    rows : Tensor, shape [directions, d_in]
        Where to begin: at least `rank` directions, at most ``min(d_out, d_in)``.
    rank : int

    Returns
    -------
    B : Tensor, shape [d_out, rank]
        Of full column rank.
    rows : Tensor, shape [directions, d_in]
        Better ones, the largest first: the product is ``B @ rows[:rank]``, the projection of `X`
        on the leading directions, so that no other coefficients for these B lose less.
    """
    inputs, outputs = Metric(H=metric.H), Metric(G=metric.G)
    Q = torch.linalg.qr(X @ inputs(rows).T).Q  # [d_out, directions]
    seen = outputs(Q)
    K, _ = whitening_factor(Q.T @ seen, 0.0)  # [directions, directions]
    C = torch.linalg.solve_triangular(K, seen.T @ X, upper=False)  # [directions, d_in]
    _, V = descending_eigh(inputs(C) @ C.T)
    B = Q @ torch.linalg.solve_triangular(K.T, V[:, :rank], upper=True)
    return B, V.T @ C


def directions(rank: int, d_out: int, d_in: int) -> int:
    """Return among how many directions a product of a rank is searched."""
    return min(DIRECTIONS * rank + MORE_DIRECTIONS, d_out, d_in)


def _shares(decay: float, rounds: int, last: int) -> list[float]:
    return [SWAPS * decay**k for k in range(rounds)] + [0.0] * last
