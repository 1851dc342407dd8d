"""Tensor trains: a weight as a chain of cores with bond dimensions that fit a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lrc.compressors.layers import Sizes
from lrc.compressors.layers.chain_shape import ChainShape, pattern_for
from lrc.compressors.methods.base import FixedSizeMethod, FixedSizeResult
from lrc.compressors.solvers.chain_fit import ChainProblem
from lrc.compressors.solvers.flops import chain_work
from lrc.compressors.solvers.moments import Statistics


@dataclass(frozen=True)
class TensorTrain(FixedSizeMethod):
    """Decompose a weight into a chain of cores, refined by alternating least squares."""

    CURVE_ROUNDS = 1
    """Rounds at one size of a rate-distortion curve, relative to which the others are estimated."""

    options: tuple[str, ...] = field(
        default=("cores", "factors", "rounds", "damp", "gradient_damp"), kw_only=True
    )
    types: tuple[str, ...] = field(default=("tensor_train",), kw_only=True)

    def pattern_of(self, d_out: int, d_in: int, options: Mapping[str, Any]) -> str:
        """Return how the dimensions of a weight are factored."""
        return pattern_for(d_out, d_in, options["cores"], options["factors"])

    def solve(
        self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any
    ) -> FixedSizeResult:
        """Find cores with bond dimensions of at most ``bond``."""
        (shape,) = self._shapes(W, [sizes], options)
        found = self._problem(W, statistics, **options).solve(shape, options["rounds"])
        parts = {f"core{k}": core for k, core in enumerate(found.cores, start=1)}
        return FixedSizeResult((parts,), found.energy, found.relative_error, found.fallback)

    def squared_errors(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Estimate the squared error at several sizes, and return that of removing W.

        Errors before any round are multiplied by a factor, the reduction by a round at the size in
        the middle. It differs between matrices, and little between sizes.
        """
        problem = self._problem(W, statistics, **options)
        rounds = min(options["rounds"], self.CURVE_ROUNDS)
        shapes = self._shapes(W, sizes, options)
        starts, middle = problem.start_energies(shapes), len(shapes) // 2
        refined = problem.solve(shapes[middle], rounds).energy
        factor = refined / starts[middle] if starts[middle] > 0 else 1.0
        return [start * factor for start in starts], problem.total

    def flops(
        self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **options: Any
    ) -> int:
        """Return the multiply-adds of all rounds, and of the errors before them for a curve."""
        cores, rounds, count = options["cores"], options["rounds"], len(sizes)
        if curve:
            rounds = min(rounds, self.CURVE_ROUNDS)
            return chain_work(d_out, d_in, cores=cores, rounds=rounds, starts=count)
        return count * chain_work(d_out, d_in, cores=cores, rounds=rounds)

    def _shapes(
        self, W: Tensor, sizes: Sequence[Sizes], options: Mapping[str, Any]
    ) -> list[ChainShape]:
        d_out, d_in = W.shape
        pattern = self.pattern_of(d_out, d_in, options)
        return [ChainShape.of(d_out, d_in, pattern, each["bond"]) for each in sizes]

    def _problem(
        self,
        W: Tensor,
        statistics: Statistics,
        *,
        cores: int,
        factors: Sequence[Sequence[int]],
        rounds: int,
        **damping: float,
    ) -> ChainProblem:
        self.check(statistics)
        options = {"cores": cores, "factors": factors}
        (shape,) = self._shapes(W, [{"bond": 1}], options)
        sides = shape.outputs, shape.inputs
        return ChainProblem.of(W, statistics.inputs, statistics.gradients, sides, **damping)
