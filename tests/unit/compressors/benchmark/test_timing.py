"""Timing with a clock that the tests set: turns, percentiles, paired ratios."""

import numpy as np
import pytest

from lrc.compressors.benchmark.timing import (
    Timer,
    paired_ratio,
    percentile,
    rounds,
    speed_of,
    verdict,
)


class Clock:
    """Advances only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_a_timer_returns_the_seconds_of_the_call_alone() -> None:
    clock = Clock()
    timer = Timer("cpu", clock)
    clock.spend(5)
    assert timer(lambda: clock.spend(0.25)) == 0.25


def test_models_take_turns_round_by_round() -> None:
    turns: list[str] = []
    measures = [lambda name=name: turns.append(name) or name for name in "dabd"]
    assert [*rounds(measures, 2)] == [["d", "a", "b", "d"]] * 2
    assert turns == ["d", "a", "b", "d"] * 2


@pytest.mark.parametrize(
    ("seconds", "expected"), [(None, 5), (0.5, 1), (1.0, 1), (1.5, 2), (9.0, 5)]
)
def test_no_round_starts_after_the_budget(seconds: float | None, expected: int) -> None:
    clock = Clock()
    done = [*rounds([lambda: clock.spend(1)], 5, seconds=seconds, clock=clock)]
    assert len(done) == expected


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_percentiles_are_those_of_numpy(fraction: float, count: int) -> None:
    values = [float(v) for v in np.random.default_rng(0).permutation(count) ** 2]
    assert percentile(values, fraction) == pytest.approx(np.percentile(values, 100 * fraction))


def test_percentiles_need_values_and_a_fraction() -> None:
    for values, fraction in (([], 0.5), ([1.0], 90)):
        with pytest.raises(ValueError, match="fraction in"):
            percentile(values, fraction)


def test_speeds_are_tokens_per_second() -> None:
    speed = speed_of([0.5, 0.1, 0.2], 10)
    assert (speed.median, speed.ratio, speed.verdict) == (50, None, None)
    assert (speed.p10, speed.p90) == pytest.approx((26, 90))
    assert speed_of([0.5], 10, ratio=0.9, noise=0.01).verdict == "slower"
    assert speed_of([0.5], 10, ratio=0.9).verdict is None


def test_a_linear_drift_of_the_machine_cancels_from_the_ratio() -> None:
    """A model of equal speed in the middle of a round, on a machine that slows down by 3 % a turn.

    Against the first turn of dense alone it would look slower.
    """
    slowdown = [1 + 0.03 * turn for turn in range(9)]
    dense, own, again = slowdown[0::3], slowdown[1::3], slowdown[2::3]
    assert paired_ratio(own, dense, again) == pytest.approx(1)
    assert paired_ratio(own, dense) < 0.98


def test_ratios_are_paired_before_the_median_is_taken() -> None:
    """Half of the rounds are ten times as slow, for both: medians of each would mix them."""
    dense, own = [1.0, 10.0, 1.0, 10.0, 1.0], [2.0, 20.0, 2.0, 20.0, 20.0]
    assert paired_ratio(own, dense) == 0.5


def test_a_ratio_needs_a_common_round() -> None:
    assert paired_ratio([], [1.0]) is None
    assert paired_ratio([1.0], []) is None
    assert paired_ratio([1.0], [2.0], []) == 2.0  # dense was not measured again
    assert paired_ratio([1.0, 1.0], [2.0, 4.0, 9.0]) == 3.0


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (0.9, 0.05, "slower"),
        (0.96, 0.05, "equal"),
        (1.04, 0.05, "equal"),
        (1.06, 0.05, "faster"),
        (0.996, 0.0, "equal"),
        (0.99, 0.0, "slower"),
    ],
)
def test_a_difference_within_the_noise_is_no_verdict(
    ratio: float, noise: float, expected: str
) -> None:
    assert verdict(ratio, noise) == expected
