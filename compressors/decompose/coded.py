"""Methods that are solved at given sizes: pruning, and dictionaries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrc.compressors.decompose.dictionary import Problem
from lrc.compressors.decompose.masked import Metric
from lrc.compressors.decompose.method import Coded, CodedMethod
from lrc.compressors.decompose.moments import Statistics
from lrc.compressors.decompose.sparse import (
    Saliency,
    damped_metric,
    prune,
    prune_curve,
    weighted_energy,
)
from lrc.compressors.layers import Sizes


@dataclass(frozen=True)
class Pruning(CodedMethod):
    """Keep some entries, chosen by their saliency; under the metrics of what is known."""

    saliency: Saliency = "second-order"

    form = "sparse"

    def solve(self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any) -> Coded:
        """Keep ``nonzeros`` entries of the whole matrix."""
        options = self.with_defaults(statistics, options)
        inputs, gradients = self._known(statistics)
        found = prune(
            W,
            inputs,
            gradients,
            nonzeros=sizes["nonzeros"],
            saliency=self.saliency,
            **options,
        )
        parts = {"W_hat": found.W_hat, "mask": found.mask}
        return Coded(parts, found.energy, found.loss, found.fallback)

    def energies(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Return the energy of the error for several numbers of entries, and that of W itself."""
        options = self.with_defaults(statistics, options)
        inputs, gradients = self._known(statistics)
        budgets = [each["nonzeros"] for each in sizes]
        found = prune_curve(
            W, inputs, gradients, nonzeros=budgets, saliency=self.saliency, **options
        )
        return found, weighted_energy(W, inputs, gradients, **options)


@dataclass(frozen=True)
class Learning(CodedMethod):
    """Learn a dictionary; the energy is that of the method's metrics, whole."""

    solver: str

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
        learnt = problem.curve(sizes, **search)
        found = [float(metric.energy(W - each.weight())) for each in learnt]
        return found, float(metric.energy(W))

    def _prepared(
        self, W: Tensor, statistics: Statistics, options: Mapping[str, Any]
    ) -> tuple[Problem, Metric, dict[str, Any]]:
        """Return the weight made ready, what its errors cost, and the options of the search."""
        options = self.with_defaults(statistics, options)
        damping = {key: options.pop(key) for key in ("damp", "gradient_damp") if key in options}
        inputs, gradients = self._known(statistics)
        problem = Problem.of(W, inputs, gradients, solver=self.solver, **damping)
        metric, _ = damped_metric(inputs, gradients, **damping)
        return problem, metric, options


_DAMP = {"damp": 1e-6}
_BOTH = {**_DAMP, "gradient_damp": 0.1}
_TWO_SIDED = frozenset({"inputs", "gradients"})

CODED: dict[str, CodedMethod] = {
    "magnitude": Pruning(frozenset(), "magnitude pruning", "magnitude"),
    "wanda": Pruning(frozenset({"inputs"}), "Wanda, arXiv:2306.11695", "wanda", options=_DAMP),
    "sparse": Pruning(
        _TWO_SIDED,
        "optimal brain surgeon (Hassibi and Stork 1993) under the K-FAC metric",
        options=_BOTH,
    ),
    "cospadi": Learning(
        frozenset({"inputs"}),
        "CoSpaDi, arXiv:2509.22075",
        "cospadi",
        options={**_DAMP, "rounds": 60, "seed": 0},
    ),
    "compot": Learning(
        _TWO_SIDED, "COMPOT, arXiv:2602.15200", "compot", options={**_BOTH, "rounds": 20}
    ),
    "rocket": Learning(_TWO_SIDED, "ROCKET, arXiv:2602.11008", "rocket", options=_BOTH),
    "dictionary": Learning(
        _TWO_SIDED,
        "hard-thresholding pursuit (Foucart 2011) with the method of optimal directions",
        "htp",
        options={**_BOTH, "rounds": 15},
    ),
}
