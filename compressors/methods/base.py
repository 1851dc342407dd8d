"""Base classes of methods, as planning and compression use them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lrc.compressors.layers import Sizes
from lrc.compressors.solvers.moments import Statistics

LOW_RANK_TYPES = ("low_rank", "pivoted_low_rank")


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    statistics: frozenset[str]
    """Fields of `Statistics` that calibration has to collect."""
    source: str
    """Publication, or origin of the idea."""
    options: tuple[str, ...] = field(default=(), kw_only=True)
    """Recipe options that are passed to the solver."""
    types: tuple[str, ...] = field(default=("dense",), kw_only=True)
    """Sums of component types that the method can produce."""
    shares_factors: bool = field(default=False, kw_only=True)
    """Whether one solution can have a first factor in common for several layers."""
    has_bias: bool = field(default=False, kw_only=True)
    """Whether a bias restores the mean output."""

    chooses_quantization = False
    """Whether an allocator may choose integers for the numbers of its components."""

    @property
    def full_moments(self) -> bool:
        """Whether second moments are needed as a whole, not only their image through the weight.

        An image through one layer carries no information about a factor of several.
        """
        return self.shares_factors

    @property
    def parts(self) -> Mapping[str, "Method"]:
        """The method that produces each of `types`; most methods produce them themselves."""
        return dict.fromkeys(self.types, self)

    def select(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the options that this method takes."""
        return {name: options[name] for name in self.options if name in options}

    def pattern_of(self, d_out: int, d_in: int, options: Mapping[str, Any]) -> str | None:
        """Return the pattern of weights of a shape, if it depends on the shape; else None."""
        return None

    def predicted_increase(self, squared_error: float, n_tokens: int) -> float | None:
        """Predict by how much a weighted error increases the loss, in nats per token.

        Returns None if the method does not weight errors by inputs and gradients.

        Notes
        -----
        A change E of the weight changes the output at token t by ``E x_t``; the second-order change
        of the summed loss is ``1/2 sum_t (g_t^T E x_t)^2`` (empirical Fisher, uncorrelated tokens).
        Kronecker factoring treats ``x`` and ``g`` as independent, which turns the sum into
        ``tr(G E H E^T) / n`` with the sums G and H; the mean over tokens divides by n once more.
        """
        if not {"inputs", "gradients"} <= self.statistics:
            return None
        return 0.5 * squared_error / n_tokens**2

    def check(self, statistics: Statistics) -> None:
        """Raise ValueError if statistics that the method needs are missing."""
        if missing := statistics.missing(self.statistics):
            raise ValueError(f"the statistics lack {', '.join(missing)}; the method needs them")


@dataclass(frozen=True)
class FixedSizeResult:
    """A weight as a sum of components of given sizes, and its error."""

    parts: tuple[dict[str, Tensor], ...]
    """Arguments of `Component.encode`, one mapping per component."""
    squared_error: float
    """Weighted by the statistics of the method."""
    relative_error: float
    """Squared error relative to that of removing the whole weight, in [0, 1]."""
    fallback: str | None = None
    """Deviation from the request; None if there was none."""


class FixedSizeMethod(Method, ABC):
    """A method that solves for given sizes; low-rank methods solve for all ranks at once."""

    # The error of such a weight is not in the span that an image through W shows.
    full_moments = True

    @abstractmethod
    def solve(
        self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any
    ) -> FixedSizeResult:
        """Approximate a weight W [d_out, d_in] by components of these sizes.

        Raises
        ------
        ValueError
            If statistics are missing, or no weight of that shape can have these sizes.
        """

    @abstractmethod
    def squared_errors(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Estimate the squared error at several sizes, and return that of removing W."""

    def squared_errors_of(
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[Statistics],
        sizes: Sequence[Sizes],
        **options: Any,
    ) -> list[tuple[list[float], float]]:
        """Return `squared_errors` of weights of equal shape.

        Methods may work on all of them at once, where that takes less time.
        """
        return [
            self.squared_errors(W, own, sizes, **options)
            for W, own in zip(weights, statistics, strict=True)
        ]

    @abstractmethod
    def flops(
        self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **options: Any
    ) -> int:
        """Return the multiply-adds of `solve` at every size, or of one call of `squared_errors`."""
