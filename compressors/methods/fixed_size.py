"""Methods that solve for given sizes: pruning, dictionary learning, and low rank plus sparse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lrc.compressors.layers import Sizes
from lrc.compressors.methods.base import FixedSizeMethod, FixedSizeResult
from lrc.compressors.solvers.dictionary_learning import DictionaryProblem
from lrc.compressors.solvers.flops import dictionary_work, pruning_work, sum_work
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.masks import GROUP_SIZES, Pattern
from lrc.compressors.solvers.metric import Metric, damped_metric, weighted_energy
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.compressors.solvers.pruning import (
    Saliency,
    prune,
    prune_curve,
    prune_curves,
)
from lrc.compressors.solvers.sparse_plus_low_rank import (
    CURVE_LAST_ROUNDS,
    LAST_ROUNDS,
    SparsePlusLowRankProblem,
)
from lrc.compressors.solvers.sparse_plus_low_rank import CURVE_ROUNDS as SUM_CURVE_ROUNDS
from lrc.compressors.solvers.sparse_plus_low_rank import ROUNDS as SUM_ROUNDS


def _moments(
    method: FixedSizeMethod, statistics: Statistics
) -> tuple[Moment | None, Moment | None]:
    """Return the moments of inputs and gradients that the method weights errors by."""
    method.check(statistics)
    return (
        statistics.inputs if "inputs" in method.statistics else None,
        statistics.gradients if "gradients" in method.statistics else None,
    )


@dataclass(frozen=True)
class Pruning(FixedSizeMethod):
    """Keep the entries with the largest saliency."""

    types: tuple[str, ...] = field(default=("sparse", "semi_structured"), kw_only=True)
    saliency: Saliency = "second-order"

    def solve(
        self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any
    ) -> FixedSizeResult:
        """Keep ``nonzeros`` entries of the whole matrix, or ``n`` of every eight.

        With pattern 2:4 half of the entries are kept.
        """
        pattern = _pattern(sizes, options)
        found = prune(
            W,
            *_moments(self, statistics),
            nonzeros=None if pattern == "2:4" else _count(sizes, W),
            saliency=self.saliency,
            **options | {"pattern": pattern},
        )
        parts = ({"W_hat": found.W_hat, "mask": found.mask},)
        return FixedSizeResult(parts, found.energy, found.relative_error, found.fallback)

    def squared_errors(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Estimate the squared error for several numbers of entries, and return that of W."""
        inputs, gradients = _moments(self, statistics)
        damping, pattern = _curve_options(sizes, options)
        total = weighted_energy(W, inputs, gradients, **damping)
        if pattern == "2:4":  # a single size; solving it takes less than a curve
            solved = [self.solve(W, statistics, each, **options) for each in sizes]
            return [each.squared_error for each in solved], total
        found = prune_curve(
            W,
            inputs,
            gradients,
            nonzeros=[_count(each, W) for each in sizes],
            pattern=pattern,
            saliency=self.saliency,
            **damping,
        )
        return found, total

    def squared_errors_of(
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[Statistics],
        sizes: Sequence[Sizes],
        **options: Any,
    ) -> list[tuple[list[float], float]]:
        """Search the masks of all weights at once."""
        damping, pattern = _curve_options(sizes, options)
        if len(weights) == 1 or self.saliency != "second-order" or pattern == "2:4":
            return super().squared_errors_of(weights, statistics, sizes, **options)
        moments = [_moments(self, each) for each in statistics]
        curves = prune_curves(
            weights,
            [inputs for inputs, _ in moments],
            [gradients for _, gradients in moments],
            nonzeros=[_count(each, weights[0]) for each in sizes],
            pattern=pattern,
            **damping,
        )
        totals = [
            weighted_energy(W, *both, **damping) for W, both in zip(weights, moments, strict=True)
        ]
        return list(zip(curves, totals, strict=True))

    def flops(
        self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **options: Any
    ) -> int:
        """Return the multiply-adds, which do not depend on the number of entries."""
        if self.saliency != "second-order":
            return 0
        return pruning_work(d_out, d_in, len(sizes), curve=curve)


def _pattern(sizes: Sizes, options: Mapping[str, Any]) -> Pattern:
    """Return the pattern of a pruned weight: only the sizes of n:8 tell it in a mixed plan."""
    return "n:8" if "n" in sizes else options.get("pattern", "unstructured")


def _curve_options(
    sizes: Sequence[Sizes], options: Mapping[str, Any]
) -> tuple[dict[str, Any], Pattern]:
    """Return the damping and the pattern of a curve."""
    damping = {key: value for key, value in options.items() if key != "pattern"}
    return damping, _pattern(sizes[0], options) if sizes else "unstructured"


def _count(sizes: Sizes, W: Tensor) -> int:
    """Return the number of entries that are kept in the whole matrix."""
    if "n" in sizes:
        return sizes["n"] * W.numel() // GROUP_SIZES["n:8"]
    return sizes["nonzeros"]


@dataclass(frozen=True)
class DictionaryLearning(FixedSizeMethod):
    """Learn a dictionary and sparse coefficients with one of several solvers."""

    CURVE_ROUNDS = 6
    """A few rounds suffice to find the shape of a rate-distortion curve."""

    solver: str
    types: tuple[str, ...] = field(default=("dictionary",), kw_only=True)

    def solve(
        self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any
    ) -> FixedSizeResult:
        """Learn ``atoms`` atoms; every output uses ``nonzeros`` of them."""
        problem, metric, search = self._problem(W, statistics, options)
        found = problem.solve(atoms=sizes["atoms"], nonzeros=sizes["nonzeros"], **search)
        error = float(metric.energy(W.double() - found.weight()))
        total = float(metric.energy(W.double()))
        parts = ({"D": found.D, "S": found.S, "mask": found.mask},)
        loss = min(1.0, error / total) if total > 0 else 0.0
        return FixedSizeResult(parts, error, loss, found.fallback)

    def squared_errors(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Estimate the squared error at several sizes after few rounds, and return that of W."""
        problem, metric, search = self._problem(W, statistics, options)
        if "rounds" in search:
            search["rounds"] = min(search["rounds"], self.CURVE_ROUNDS)
        W = W.double()
        # TF32 reduces the quality of the search only; errors are measured in float64.
        with tensor_cores(W.device):
            learnt = problem.curve(sizes, **search)
            found = [float(metric.energy(W - each.weight())) for each in learnt]
        return found, float(metric.energy(W))

    def flops(
        self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **options: Any
    ) -> int:
        """Return the multiply-adds of the solver's rounds."""
        rounds = options.get("rounds", 1)
        if curve:
            rounds = min(rounds, self.CURVE_ROUNDS)
        return sum(
            dictionary_work(self.solver, d_out, d_in, rounds=rounds, **each) for each in sizes
        )

    def _problem(
        self, W: Tensor, statistics: Statistics, options: Mapping[str, Any]
    ) -> tuple[DictionaryProblem, Metric, dict[str, Any]]:
        """Return the whitened problem, the metric of its errors, and the options of the search."""
        damping = {key: options[key] for key in ("damp", "gradient_damp") if key in options}
        search = {key: value for key, value in options.items() if key not in damping}
        inputs, gradients = _moments(self, statistics)
        problem = DictionaryProblem.of(W, inputs, gradients, solver=self.solver, **damping)
        metric, _ = damped_metric(inputs, gradients, **damping)
        return problem, metric, search


@dataclass(frozen=True)
class LowRankPlusSparse(FixedSizeMethod):
    """Search a low-rank and a sparse part together."""

    types: tuple[str, ...] = field(default=("pivoted_low_rank+sparse",), kw_only=True)

    def solve(
        self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any
    ) -> FixedSizeResult:
        """Find a product of ``rank`` and ``nonzeros`` entries."""
        found = self._problem(W, statistics, options).solve(**sizes)
        parts = {"B": found.B, "A": found.A}, {"W_hat": found.M, "mask": found.mask}
        return FixedSizeResult(parts, found.energy, found.relative_error, found.fallback)

    def squared_errors(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Estimate the squared error at several sizes after fewer rounds, and return that of W."""
        problem = self._problem(W, statistics, options)
        return problem.curve(sizes), problem.total

    def flops(
        self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **options: Any
    ) -> int:
        """Return the multiply-adds of the rounds."""
        rounds = SUM_CURVE_ROUNDS + CURVE_LAST_ROUNDS if curve else SUM_ROUNDS + LAST_ROUNDS
        return sum(
            sum_work(d_out, d_in, rank=each["rank"], rounds=rounds, start=not curve or number == 0)
            for number, each in enumerate(sizes)
        )

    def _problem(
        self, W: Tensor, statistics: Statistics, options: Mapping[str, Any]
    ) -> SparsePlusLowRankProblem:
        return SparsePlusLowRankProblem.of(W, *_moments(self, statistics), **options)


_TWO_SIDED = frozenset({"inputs", "gradients"})
_DAMPING = ("damp", "gradient_damp")

LOW_RANK_PLUS_SPARSE = LowRankPlusSparse(
    _TWO_SIDED,
    "low rank and sparse at once: GoDec (Zhou and Tao 2011), under the K-FAC metric",
    options=_DAMPING,
)
"""Part of the method ``mixed`` only."""

FIXED_SIZE: dict[str, FixedSizeMethod] = {
    "magnitude": Pruning(frozenset(), "magnitude pruning", "magnitude", options=("pattern",)),
    "wanda": Pruning(
        frozenset({"inputs"}), "Wanda, arXiv:2306.11695", "wanda", options=("damp", "pattern")
    ),
    "sparse": Pruning(
        _TWO_SIDED,
        "optimal brain surgeon (Hassibi and Stork 1993) under the K-FAC metric",
        options=(*_DAMPING, "pattern"),
    ),
    "cospadi": DictionaryLearning(
        frozenset({"inputs"}),
        "CoSpaDi, arXiv:2509.22075",
        "cospadi",
        options=("damp", "rounds", "seed"),
        shares_factors=True,
    ),
    "compot": DictionaryLearning(
        _TWO_SIDED,
        "COMPOT, arXiv:2602.15200",
        "compot",
        options=(*_DAMPING, "pattern", "rounds"),
    ),
    "rocket": DictionaryLearning(
        _TWO_SIDED, "ROCKET, arXiv:2602.11008", "rocket", options=_DAMPING
    ),
    "dictionary": DictionaryLearning(
        _TWO_SIDED,
        "hard-thresholding pursuit (Foucart 2011) with the method of optimal directions",
        "htp",
        options=(*_DAMPING, "pattern", "rounds"),
    ),
}
