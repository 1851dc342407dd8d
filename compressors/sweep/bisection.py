"""Find the smallest budget that meets a target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

EVALUATIONS = 6
RESOLUTION = 0.004
"""Width of the interval at which the search ends early."""
ATTEMPTS = 2 * EVALUATIONS
"""Fractions to try, including those below the smallest possible budget, which cost nothing."""

Verdict = Literal["met", "missed", "infeasible"]


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    keep: float | None
    """Smallest fraction that is known to meet the target; None if none is."""
    not_met: float | None
    """Largest fraction that is known to miss it; None if none is known."""


def smallest_keep(
    verdict: Callable[[float], Verdict],
    *,
    low: float = 0.0,
    high: float = 1.0,
    evaluations: int = EVALUATIONS,
) -> Found:
    """Return the smallest fraction that meets a target, by bisection.

    Parameters
    ----------
    verdict : callable
        Whether a fraction meets the target, misses it, or is below every possible budget. It must
        be monotonic: what meets the target still does so at a larger fraction.
    low, high : float
        The interval to search, which does not contain its ends: the target is taken to be missed
        at `low`, and nothing is compressed at `high`.
    evaluations : int
        Limit of the verdicts that are not ``infeasible``. The result is then within
        ``(high - low) / 2 ** evaluations`` of the smallest fraction if all budgets are possible.

    >>> smallest_keep(lambda keep: "met" if keep >= 0.3 else "missed")
    Found(keep=0.3125, not_met=0.2969)
    """
    found, missed = None, None
    for _ in range(ATTEMPTS):
        if evaluations == 0 or high - low < RESOLUTION:
            break
        keep = round((low + high) / 2, 4)
        answer = verdict(keep)
        evaluations -= answer != "infeasible"
        if answer == "met":
            found = high = keep
        else:
            low = keep
            missed = keep if answer == "missed" else missed
    return Found(found, missed)
