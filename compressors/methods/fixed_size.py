"""Methods that are solved at given sizes: pruning, dictionaries, and sums."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lrc.compressors.layers import Sizes
from lrc.compressors.methods.base import Coded, CodedMethod
from lrc.compressors.solvers.dictionary_learning import DictionaryProblem
from lrc.compressors.solvers.flops import dictionary_work, pruning_work, sum_work
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.metric import Metric, damped_metric, weighted_energy
from lrc.compressors.solvers.moments import Statistics
from lrc.compressors.solvers.pruning import (
    CURVE_ROUNDS,
    ROUNDS,
    Saliency,
    prune,
    prune_curve,
)
from lrc.compressors.solvers.sparse_plus_low_rank import (
    CURVE_LAST_ROUNDS,
    LAST_ROUNDS,
    SparsePlusLowRankProblem,
)
from lrc.compressors.solvers.sparse_plus_low_rank import CURVE_ROUNDS as SUM_CURVE_ROUNDS
from lrc.compressors.solvers.sparse_plus_low_rank import ROUNDS as SUM_ROUNDS


@dataclass(frozen=True)
class Pruning(CodedMethod):
    """Keep some entries, chosen by their saliency; under the metrics of what is known."""

    saliency: Saliency = "second-order"

    form = "sparse"

    def solve(self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any) -> Coded:
        """Keep ``nonzeros`` entries of the whole matrix; with pattern 2:4 always half of them."""
        options = self.with_defaults(statistics, options)
        inputs, gradients = self._known(statistics)
        found = prune(
            W,
            inputs,
            gradients,
            nonzeros=None if options["pattern"] == "2:4" else sizes["nonzeros"],
            saliency=self.saliency,
            **options,
        )
        parts = {"W_hat": found.W_hat, "mask": found.mask}
        return Coded(parts, found.energy, found.loss, found.fallback)

    def energies(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Return the energy of the error for several numbers of entries, and that of W itself."""
        damping = self.with_defaults(statistics, options)
        pattern = damping.pop("pattern")
        inputs, gradients = self._known(statistics)
        total = weighted_energy(W, inputs, gradients, **damping)
        if pattern == "2:4":  # one size, which takes less time than a curve even if solved for good
            return [self.solve(W, statistics, each, **options).energy for each in sizes], total
        budgets = [each["nonzeros"] for each in sizes]
        found = prune_curve(
            W, inputs, gradients, nonzeros=budgets, saliency=self.saliency, **damping
        )
        return found, total

    def work(self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **_: Any) -> int:
        """Count multiply-adds: they do not depend on how many entries are kept."""
        if self.saliency != "second-order":
            return 0
        return len(sizes) * pruning_work(d_out, d_in, rounds=CURVE_ROUNDS if curve else ROUNDS)


@dataclass(frozen=True)
class Learning(CodedMethod):
    """Learn a dictionary; the energy is that of the method's metrics, whole."""

    solver: str
    shared: bool = field(default=False, kw_only=True)

    form = "dictionary"
    ALLOCATION_ROUNDS = 6
    """Rounds are cheap to leave out where only the shape of a curve is asked for."""

    def solve(self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any) -> Coded:
        """Learn ``atoms`` atoms, of which every output uses ``nonzeros``."""
        problem, metric, search = self._prepared(W, statistics, options)
        found = problem.solve(atoms=sizes["atoms"], nonzeros=sizes["nonzeros"], **search)
        energy = float(metric.energy(W.double() - found.weight()))
        total = float(metric.energy(W.double()))
        parts = {"D": found.D, "S": found.S, "mask": found.mask}
        return Coded(parts, energy, energy / total if total > 0 else 0.0, found.fallback)

    def energies(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Return the energy of the error at several sizes, after few rounds, and that of W."""
        problem, metric, search = self._prepared(W, statistics, options)
        if "rounds" in search:
            search["rounds"] = min(search["rounds"], self.ALLOCATION_ROUNDS)
        W = W.double()
        # What is found is measured in float64: rounding costs quality of the search, not truth.
        with tensor_cores() if W.is_cuda else nullcontext():
            learnt = problem.curve(sizes, **search)
            found = [float(metric.energy(W - each.weight())) for each in learnt]
        return found, float(metric.energy(W))

    def work(
        self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **options: Any
    ) -> int:
        """Count the multiply-adds of the solver's rounds."""
        rounds = {**self.options, **options}.get("rounds", 1)
        if curve:
            rounds = min(rounds, self.ALLOCATION_ROUNDS)
        return sum(
            dictionary_work(self.solver, d_out, d_in, rounds=rounds, **each) for each in sizes
        )

    def _prepared(
        self, W: Tensor, statistics: Statistics, options: Mapping[str, Any]
    ) -> tuple[DictionaryProblem, Metric, dict[str, Any]]:
        """Return the weight made ready, what its errors cost, and the options of the search."""
        options = self.with_defaults(statistics, options)
        damping = {key: options.pop(key) for key in ("damp", "gradient_damp") if key in options}
        inputs, gradients = self._known(statistics)
        problem = DictionaryProblem.of(W, inputs, gradients, solver=self.solver, **damping)
        metric, _ = damped_metric(inputs, gradients, **damping)
        return problem, metric, options


@dataclass(frozen=True)
class Summing(CodedMethod):
    """A product of low rank and entries beside it, searched together."""

    form = "low_rank_plus_sparse"

    def solve(self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any) -> Coded:
        """Find a product of ``rank`` and ``nonzeros`` entries."""
        found = self._problem(W, statistics, options).solve(**sizes)
        parts = {"B": found.B, "A": found.A, "M": found.M, "mask": found.mask}
        return Coded(parts, found.energy, found.loss, found.fallback)

    def energies(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Return the energy of the error at several sizes, after fewer rounds, and that of W."""
        problem = self._problem(W, statistics, options)
        return problem.curve(sizes), problem.total

    def work(self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **_: Any) -> int:
        """Count the multiply-adds of the rounds."""
        rounds = SUM_CURVE_ROUNDS + CURVE_LAST_ROUNDS if curve else SUM_ROUNDS + LAST_ROUNDS
        return sum(
            sum_work(d_out, d_in, rank=each["rank"], rounds=rounds, start=not curve or number == 0)
            for number, each in enumerate(sizes)
        )

    def _problem(
        self, W: Tensor, statistics: Statistics, options: Mapping[str, Any]
    ) -> SparsePlusLowRankProblem:
        damping = self.with_defaults(statistics, options)
        return SparsePlusLowRankProblem.of(W, *self._known(statistics), **damping)


_DAMP = {"damp": 1e-6}
_BOTH = {**_DAMP, "gradient_damp": 0.1}
_PATTERN = {"pattern": "unstructured"}
_TWO_SIDED = frozenset({"inputs", "gradients"})

SUM = Summing(
    _TWO_SIDED,
    "low rank and sparse at once: GoDec (Zhou and Tao 2011), under the K-FAC metric",
    options=_BOTH,
)
"""Part of mixed plans only."""

CODED: dict[str, CodedMethod] = {
    "magnitude": Pruning(frozenset(), "magnitude pruning", "magnitude", options=_PATTERN),
    "wanda": Pruning(
        frozenset({"inputs"}), "Wanda, arXiv:2306.11695", "wanda", options={**_DAMP, **_PATTERN}
    ),
    "sparse": Pruning(
        _TWO_SIDED,
        "optimal brain surgeon (Hassibi and Stork 1993) under the K-FAC metric",
        options={**_BOTH, **_PATTERN},
    ),
    "cospadi": Learning(
        frozenset({"inputs"}),
        "CoSpaDi, arXiv:2509.22075",
        "cospadi",
        options={**_DAMP, "rounds": 60, "seed": 0},
        shared=True,
    ),
    "compot": Learning(
        _TWO_SIDED,
        "COMPOT, arXiv:2602.15200",
        "compot",
        options={**_BOTH, **_PATTERN, "rounds": 20},
    ),
    "rocket": Learning(_TWO_SIDED, "ROCKET, arXiv:2602.11008", "rocket", options=_BOTH),
    "dictionary": Learning(
        _TWO_SIDED,
        "hard-thresholding pursuit (Foucart 2011) with the method of optimal directions",
        "htp",
        options={**_BOTH, **_PATTERN, "rounds": 15},
    ),
}
