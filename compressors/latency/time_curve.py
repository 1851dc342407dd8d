"""The time of a product as a function of one size, from times at a few sizes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression


@dataclass(frozen=True)
class TimeCurve:
    """Measured times of one kind of product at ascending sizes.

    Times do not decrease with the size: measured ones that do, from noise, are replaced by the
    closest ones that do not (isotonic regression). Between two sizes the time is linear. Below the
    first size it is that of the first, because most of the time of a small product is the call;
    above the last one, the last line continues.
    """

    sizes: tuple[int, ...]
    """Ascending; ``(0,)`` for a product without a size."""
    nanoseconds: tuple[int, ...]
    """As measured."""

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or len(self.sizes) != len(self.nanoseconds) or not rises:
            raise ValueError(
                f"needs as many times as ascending sizes, at least one, got {len(self.sizes)} "
                f"sizes and {len(self.nanoseconds)} times"
            )
        if min(self.sizes) < 0 or min(self.nanoseconds) < 1:
            raise ValueError("sizes must be at least 0 and times at least 1 ns")

    @cached_property
    def fitted(self) -> NDArray[np.float64]:
        """Times at `sizes` that do not decrease, closest to the measured ones by least squares."""
        found: NDArray[np.float64] = isotonic_regression(np.array(self.nanoseconds, float)).x
        return found

    @property
    def least(self) -> int:
        """The shortest time, that of the smallest size."""
        return round(float(self.fitted[0]))

    def at(self, size: int) -> int:
        """Return the time in nanoseconds at any size."""
        beyond = size - self.sizes[-1]
        if beyond > 0 and len(self.sizes) > 1:
            rise = self.fitted[-1] - self.fitted[-2]
            slope = rise / (self.sizes[-1] - self.sizes[-2])
            return round(float(self.fitted[-1] + slope * beyond))
        return round(float(np.interp(size, self.sizes, self.fitted)))
