"""The search for the entries that a sparse weight keeps, by swaps that a refit pays for.

It starts from the entries that cost most to remove, refits what is kept, and swaps entries where
the refit says that the other choice is cheaper, ever fewer a round.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.solvers.masked_least_squares import (
    Metric,
    masked_least_squares,
    released_error,
)

Pattern = Literal["unstructured", "2:4"]

GROUP, KEPT_IN_GROUP = 4, 2
# The inverses that the search reads are those of channels of unit energy, damped by this share: in
# float32 they then keep four digits along a direction with a thousand times the mean energy.
SEARCH_DAMP = 1e-4
# Swaps of the first round as a share of what is removed, and what is left of it a round later:
# more at once and swaps get in each other's way, fewer and eight rounds do not suffice.
SWAPS, SWAPS_DECAY = 0.05, 0.65
# Steps of the refit of a swapped mask; of the first and the last one, so that masks compare fairly;
# and of the very last in the metric itself, for what `SEARCH_DAMP` hides. With few tokens a metric
# is so steep that half of these steps leave twice the error where most entries are removed.
STEPS, OUTER_STEPS, STEPS_IN_METRIC = 6, 12, 6
# Channels without energy are measured in this share of the mean instead.
DEAD = 1e-12


def flags(W: Tensor, indices: Tensor) -> Tensor:
    """Return a mask of the shape of `W`, True at some flat indices."""
    mask = torch.zeros(W.numel(), dtype=torch.bool, device=W.device)
    mask[indices] = True
    return mask.view(W.shape)


def best_of_groups(score: Tensor) -> Tensor:
    """Return the mask of the two highest scores among every four of a row."""
    groups = score.reshape(-1, GROUP)
    best = groups.topk(KEPT_IN_GROUP, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(score.shape)


@dataclass(frozen=True)
class State:
    """A mask that keeps `count` entries, fitted: multipliers, error and energy, all scaled."""

    mask: Tensor
    count: int
    multipliers: Tensor
    error: Tensor
    energy: float


@dataclass(frozen=True)
class Search:
    """A pruning problem in float32, scaled so that both metrics have unit diagonals.

    `unit` [d_out, d_in] is what an error is multiplied by to be scaled. `slack` [d_out, d_in] is
    the diagonal of the inverse metric: 1 where an entry is on its own, more where others can make
    up for it.
    """

    W: Tensor
    unit: Tensor
    metric: Metric
    inverse: Metric
    slack: Tensor
    pattern: Pattern
    fallback: str | None

    @classmethod
    def of(cls, W: Tensor, metric: Metric, pattern: Pattern) -> "Search":
        """Scale a problem given in float64."""
        left, right = (d.clamp_min(DEAD * d.mean()).sqrt() for d in metric.diagonals(W))
        scaled = metric.scaled(left, right)
        inverse, fallback = scaled.inverse(SEARCH_DAMP)
        unit = left * right  # [d_out, d_in]
        size = (W * unit).abs().mean()
        unit = unit / torch.where(size > 0, size, 1)
        a, b = inverse.diagonals(W)
        single = torch.float32
        return cls(
            (W * unit).to(single), unit, scaled.to(single), inverse.to(single),
            (a * b).to(single), pattern, fallback,
        )  # fmt: skip

    def unscaled(self, error: Tensor) -> Tensor:
        """Return an error in the units of the weight, float64."""
        return error.double() / self.unit

    def dense(self) -> State:
        """Return where every search starts: everything kept."""
        nothing = torch.zeros_like(self.W)
        return State(nothing == 0, nothing.numel(), nothing, nothing, 0.0)

    def best(self, state: State, nonzeros: int, rounds: int) -> State:
        """Prune down to `nonzeros`, swap entries, and return the best fit that was seen."""
        best = now = self._fitted(
            self._reselected(state, nonzeros, 0), nonzeros, state, OUTER_STEPS
        )
        share = SWAPS
        for _ in range(rounds):
            swaps = min(nonzeros, ceil(share * (self.W.numel() - nonzeros)))
            mask = self._reselected(now, nonzeros, swaps)
            if torch.equal(mask, now.mask):
                break
            # Swaps that pay off may not do so yet after few steps, so they go on from here anyway.
            now = self._fitted(mask, nonzeros, now, STEPS)
            best = min(best, now, key=lambda s: s.energy)
            share *= SWAPS_DECAY
        last = self._fitted(now.mask, nonzeros, now, OUTER_STEPS)
        return min(last, best, key=lambda s: s.energy)

    def beside(self, known: Tensor) -> "Search":
        """Return the problem of what `known` [d_out, d_in], scaled, leaves of the weight."""
        return replace(self, W=self.W - known)

    def swapped(self, state: State, nonzeros: int, share: float, steps: int = STEPS) -> State:
        """Go one round: prune down to `nonzeros`, swap a share of what is removed, and fit."""
        swaps = min(nonzeros, ceil(share * (self.W.numel() - nonzeros)))
        return self._fitted(self._reselected(state, nonzeros, swaps), nonzeros, state, steps)

    def refitted(self, state: State) -> Tensor:
        """Lower the error of a state further, in the metric itself without `SEARCH_DAMP`."""
        E = state.error
        nothing = torch.zeros_like(E)
        return E - masked_least_squares(E, self.metric, state.mask, nothing, steps=STEPS_IN_METRIC)

    def _fitted(self, mask: Tensor, count: int, start: State, steps: int) -> State:
        multipliers, error = released_error(
            self.W, self.inverse, mask, start.multipliers, steps=steps
        )
        return State(mask, count, multipliers, error, float(self.metric.energy(error)))

    def _reselected(self, state: State, nonzeros: int, swaps: int) -> Tensor:
        """Drop what costs least down to `nonzeros`, then make the best swaps, at most so many."""
        loses = (self.W - state.error).square() / self.slack  # [d_out, d_in]
        gains = state.multipliers.square() * self.slack
        dropped = state.count - nonzeros
        if self.pattern == "2:4":
            score = torch.where(state.mask, loses, gains)
            mask = best_of_groups(score)
            if dropped:
                return mask
            gain = (score * (mask.float() - state.mask.float())).view(-1, GROUP).sum(1)
            chosen = flags(gain, gain.topk(min(swaps, len(gain))).indices) & (gain > 0)
            changed = chosen.repeat_interleave(GROUP).view(mask.shape)
            return torch.where(changed, mask, state.mask)
        leaving = torch.where(state.mask, loses, torch.inf).flatten()
        out, outgoing = leaving.topk(dropped + swaps, largest=False)
        mask = state.mask.flatten().clone()
        mask[outgoing[:dropped]] = False
        coming = torch.where(state.mask, -torch.inf, gains).flatten()
        come, incoming = coming.topk(swaps)
        better = come > out[dropped:]
        mask[outgoing[dropped:]] &= ~better
        mask[incoming] |= better
        return mask.view(state.mask.shape)
