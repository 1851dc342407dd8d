"""Seconds of calls that take turns, and what follows from them: percentiles and paired ratios."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Clock = Callable[[], float]

EQUAL = 0.005
"""Ratios closer to 1 than this are equal even if the noise is smaller: they print as 1.00."""


class Timer:
    """Measure the seconds of a call, waiting for the device before and after it.

    Parameters
    ----------
    device : str
    clock : callable
        Returns seconds, ascending.
    """

    def __init__(self, device: str, clock: Clock = time.perf_counter) -> None:
        self._device, self.clock = device, clock

    def __call__(self, run: Callable[[], Any]) -> float:
        """Return the seconds that `run` takes."""
        self._wait()
        start = self.clock()
        run()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)


def rounds(
    measures: Sequence[Callable[[], T]],
    repeats: int,
    *,
    seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> Iterator[list[T]]:
    """Call all `measures` in turn, `repeats` times; yield the results of each round.

    Machines change their speed within seconds (clock rates, other processes). Because models take
    turns within a round, such a change affects all of them, and not the ratio between them.

    Parameters
    ----------
    seconds : float, optional
        Start no further round after this time; the first one is always completed.
    """
    start = clock()
    for number in range(repeats):
        if number and seconds is not None and clock() - start >= seconds:
            return
        yield [measure() for measure in measures]


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values.

    >>> percentile([3.0, 1.0, 2.0], 0.75)
    2.5
    """
    if not values or not 0 <= fraction <= 1:
        raise ValueError(
            f"needs values and a fraction in [0, 1], got {len(values)} values and {fraction}"
        )
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Speed:
    """Speed of one phase over all rounds, in tokens per second."""

    median: float
    p10: float
    p90: float
    ratio: float | None = None
    """Speed relative to dense: the median over the rounds of the ratio within a round."""
    verdict: str | None = None
    """``faster`` or ``slower`` than dense, ``equal`` if the difference is not above the noise."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def speed_of(
    seconds: Sequence[float], tokens: int, *, ratio: float | None = None, noise: float | None = None
) -> Speed:
    """Return the speed of runs that process `tokens` tokens each.

    Parameters
    ----------
    seconds : sequence of float
        One entry per round.
    ratio : float, optional
        As `paired_ratio` returns it.
    noise : float, optional
        Largest difference of `ratio` from 1 that is no verdict; none is given without it.
    """
    rates = [tokens / each for each in seconds]
    return Speed(
        statistics.median(rates),
        percentile(rates, 0.1),
        percentile(rates, 0.9),
        ratio,
        None if ratio is None or noise is None else verdict(ratio, noise),
    )


def paired_ratio(
    seconds: Sequence[float], dense: Sequence[float], again: Sequence[float] | None = None
) -> float | None:
    """Return how many times as fast as dense a model is; None without a common round.

    Parameters
    ----------
    seconds, dense, again : sequence of float
        One entry per round: of the model, of the dense model at the start of the round and, if
        measured, at its end. The model is compared with the mean of both, from which a speed of
        the machine that drifts linearly cancels.
    """
    both = dense if not again else [(x + y) / 2 for x, y in zip(dense, again, strict=False)]
    pairs = [reference / own for own, reference in zip(seconds, both, strict=False)]
    return statistics.median(pairs) if pairs else None


def verdict(ratio: float, noise: float) -> str:
    """Return ``faster``, ``slower`` or, within the noise, ``equal``.

    >>> verdict(0.87, noise=0.02), verdict(0.99, noise=0.02), verdict(1.3, noise=0.02)
    ('slower', 'equal', 'faster')
    """
    if abs(ratio - 1) <= max(noise, EQUAL):
        return "equal"
    return "faster" if ratio > 1 else "slower"
