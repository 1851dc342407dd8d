"""Search for the mask of a sparse weight, by swaps that a least-squares refit evaluates.

The search starts from the entries that are most expensive to remove, refits the kept values, and
exchanges entries where the refit predicts a lower error, fewer in each round.

Several weights of equal shape can be searched together, as stacks [n, d_out, d_in], with masks of
equally many entries. On a GPU that takes less time than one after the other if they are small.
"""

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from lrc.compressors.solvers.half_precision import HalfPrecisionMetric
from lrc.compressors.solvers.masked_least_squares import compensated_error, masked_least_squares
from lrc.compressors.solvers.masks import (
    GROUP_SIZES,
    Pattern,
    drop_and_swap,
    largest_of_groups,
    swap_in_groups,
)
from lrc.compressors.solvers.metric import Metric

# Damping of the inverses, as a fraction of the mean of the metrics scaled to unit diagonal. In
# float32 they then have four correct digits in a direction of a thousand times the mean energy.
SEARCH_DAMP = 1e-4
# Swaps in the first round as a fraction of the removed entries, and the decay of that fraction per
# round. With more swaps at once they interfere; with fewer, eight rounds are not enough.
# Groups exchange at most one pair each and bear three times as many: on three matrices of
# SmolLM2-135M at 4:8, 0.05 leaves 4 to 6 % more error, 0.3 up to 2 %.
SWAPS, GROUP_SWAPS, SWAPS_DECAY = 0.05, 0.15, 0.65
# Conjugate-gradient steps after a swap, and for the first and the last mask, so that masks are
# compared fairly. With few tokens a metric is so ill-conditioned that half of these steps leave
# twice the error if most entries are removed.
STEPS, OUTER_STEPS = 6, 12
# Steps for the values of the chosen mask, without `SEARCH_DAMP`; fewer for each size of a curve. On
# matrices of layer 1 of SmolLM2-135M with 0.4 to 0.8 of the entries, 24 steps leave 18 % (q), 13 %
# (o), 10 % (k), 7 % (gate), 4 % (v) and 0 % (down) less error than 6; on other text nearly as much.
STEPS_IN_METRIC, CURVE_STEPS_IN_METRIC = 24, 6
# Numbers of a weight from which products are in half precision, on a GPU. Smaller ones are limited
# by the launches of kernels. In half precision, the energies of six matrices of SmolLM2-135M (kfac)
# are at most 0.2 % higher and 1.4 % lower. Those of q in layer 1, whose search is the least stable,
# change by up to 5 % in either direction.
HALF_FROM = 2**22
# Lower bound for the energy of a channel, as a fraction of the mean.
DEAD = 1e-12


@dataclass(frozen=True)
class MaskState:
    """A mask that keeps `count` entries, and the refit of its values, in scaled units.

    Of a stack, each mask has as many entries, and there is one energy per mask.
    """

    mask: Tensor
    count: int
    multipliers: Tensor
    error: Tensor
    energy: Tensor

    def where(self, condition: Tensor, other: "MaskState") -> "MaskState":
        """Return this state where a condition, one per mask, holds, and the `other` elsewhere."""
        if condition.ndim == 0:
            return self if condition else other
        each = condition[:, None, None]
        return MaskState(
            torch.where(each, self.mask, other.mask),
            self.count,
            torch.where(each, self.multipliers, other.multipliers),
            torch.where(each, self.error, other.error),
            torch.where(condition, self.energy, other.energy),
        )

    def better(self, other: "MaskState") -> "MaskState":
        """Return the state of lower energy, this one if they are equal."""
        return other.where(other.energy < self.energy, self)


@dataclass(frozen=True)
class MaskSearch:
    """A pruning problem in float32, scaled so that both metrics have unit diagonals."""

    W: Tensor
    """[..., d_out, d_in], scaled."""
    unit: Tensor
    """[..., d_out, d_in], factor by which an error is scaled."""
    metric: Metric
    rounded: Metric
    """The metric for products; in half precision if the weight is large, on a GPU."""
    inverse: Metric
    """The inverse for products, like `rounded`."""
    slack: Tensor
    """[..., d_out, d_in], diagonal of the inverse metric: 1 for an entry without correlations,
    larger if others can compensate for it."""
    pattern: Pattern
    fallback: str | None

    @classmethod
    def of(cls, W: Tensor, metric: Metric, pattern: Pattern) -> "MaskSearch":
        """Scale a problem; `W` [..., d_out, d_in] and the metric are in float64."""
        left, right = (
            d.clamp_min(DEAD * d.mean(dim=(-2, -1), keepdim=True)).sqrt()
            for d in metric.diagonals(W)
        )
        single = torch.float32
        scaled = metric.scaled(left, right)
        inverse, fallback = scaled.inverse(SEARCH_DAMP, single)
        unit = left * right  # [..., d_out, d_in]
        size = (W * unit).abs().mean(dim=(-2, -1), keepdim=True)
        unit = unit / torch.where(size > 0, size, 1)
        W = (W * unit).to(single)
        a, b = inverse.diagonals(W)
        metric = scaled.to(single).laid_out()
        half = W.is_cuda and W.shape[-2] * W.shape[-1] >= HALF_FROM
        rounded, inverse = (_for_products(each, half=half) for each in (metric, inverse))
        return cls(W, unit, metric, rounded, inverse, a * b, pattern, fallback)

    def of_rows(self, rows: slice) -> "MaskSearch":
        """Return the problem of some rows alone, in the same precision.

        It shares the matrices of the inputs.
        """
        # Copies, which do not keep the matrices of all rows in memory. G is inverted from float32,
        # the rounding errors of which are smaller than the damping.
        W, unit = (M[..., rows, :].clone() for M in (self.W, self.unit))
        part = self.metric.of_rows(rows).G
        G = None if part is None else part.clone()
        outputs = Metric(None, None if G is None else G.double())
        left, note = outputs.inverse(SEARCH_DAMP, W.dtype)
        half = isinstance(self.rounded, HalfPrecisionMetric)
        inverse = Metric(self.inverse.H, left.G)
        a, b = inverse.diagonals(W)
        fallback = "; ".join(dict.fromkeys(filter(None, [self.fallback, note]))) or None
        return replace(
            self,
            W=W,
            unit=unit,
            metric=Metric(self.metric.H, G),
            rounded=_for_products(Metric(self.rounded.H, G), half=half),
            inverse=_for_products(inverse, half=half),
            slack=a * b,
            fallback=fallback,
        )

    def unscaled(self, error: Tensor) -> Tensor:
        """Convert an error to the units of the weight, in float64."""
        return error.double() / self.unit

    def dense(self) -> MaskState:
        """Return the starting point of every search, with all entries kept."""
        zero = torch.zeros_like(self.W)
        return MaskState(zero == 0, self._numbers, zero, zero, zero[..., 0, 0])

    def best(self, state: MaskState, nonzeros: int, rounds: int) -> MaskState:
        """Prune to `nonzeros` entries, swap entries, and return the state of lowest error."""
        best = now = self.swapped(state, nonzeros, 0.0, OUTER_STEPS)
        fraction = SWAPS if self.pattern == "unstructured" else GROUP_SWAPS
        ended = torch.zeros_like(now.energy, dtype=torch.bool)
        for _ in range(rounds):
            mask = self._reselected(now, nonzeros, fraction)
            ended |= (mask == now.mask).all(dim=-1).all(dim=-1)
            if ended.all():
                break
            # Continue even if the error rises: a few steps may not yet show the benefit of a swap.
            now = now.where(ended, self._fitted(mask, nonzeros, now, STEPS))
            best = best.better(now)
            fraction *= SWAPS_DECAY
        last = self._fitted(now.mask, nonzeros, now, OUTER_STEPS)
        return last.better(best)

    def swapped(
        self, state: MaskState, nonzeros: int, fraction: float, steps: int = STEPS
    ) -> MaskState:
        """Prune to `nonzeros`, swap a fraction of the removed entries, and refit the values."""
        return self._fitted(self._reselected(state, nonzeros, fraction), nonzeros, state, steps)

    def refined(self, state: MaskState, steps: int = STEPS_IN_METRIC) -> Tensor:
        """Return the error [..., d_out, d_in] after further steps in the undamped metric."""
        E = state.error
        zero = torch.zeros_like(E)
        return E - masked_least_squares(E, self.rounded, state.mask, zero, steps=steps)

    def _fitted(self, mask: Tensor, count: int, start: MaskState, steps: int) -> MaskState:
        multipliers, error = compensated_error(
            self.W, self.inverse, mask, start.multipliers, steps=steps
        )
        return MaskState(mask, count, multipliers, error, self.rounded.energy(error))

    def _reselected(self, state: MaskState, nonzeros: int, fraction: float) -> Tensor:
        swaps = min(nonzeros, ceil(fraction * (self._numbers - nonzeros)))
        drop = state.count - nonzeros
        losses = (self.W - state.error).square() / self.slack  # [..., d_out, d_in]
        gains = state.multipliers.square() * self.slack
        if self.pattern == "unstructured":
            return drop_and_swap(state.mask, losses, gains, drop=drop, swaps=swaps)
        size = GROUP_SIZES[self.pattern]
        if drop:
            count = nonzeros * size // self._numbers  # in every group
            scores = torch.where(state.mask, losses, -1)
            return largest_of_groups(scores, count, size, scores.ndim - 1)
        return swap_in_groups(state.mask, losses, gains, size=size, swaps=swaps)

    @property
    def _numbers(self) -> int:
        """Numbers of a weight."""
        return self.W.shape[-2] * self.W.shape[-1]


def _for_products(metric: Metric, *, half: bool) -> Metric:
    """Return a metric in the precision and with the strides in which products are computed."""
    laid_out = metric.laid_out()
    return HalfPrecisionMetric.of(laid_out) if half else laid_out
