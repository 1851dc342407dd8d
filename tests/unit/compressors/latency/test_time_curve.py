"""The time at any size: monotone, and exact where times are measured and do not decrease."""

from random import Random

import pytest

from lrc.compressors.latency.time_curve import TimeCurve


def test_measured_times_that_rise_are_returned_and_interpolated_linearly() -> None:
    curve = TimeCurve((10, 20, 40), (100, 300, 400))
    assert [curve.at(size) for size in (10, 20, 40)] == [100, 300, 400]
    assert [curve.at(size) for size in (15, 30)] == [200, 350]


def test_below_the_first_size_the_call_dominates_and_above_the_last_the_line_continues() -> None:
    curve = TimeCurve((10, 20, 40), (100, 300, 400))
    assert curve.at(1) == curve.least == 100
    assert curve.at(60) == 500
    assert TimeCurve((7,), (5,)).at(700) == 5


def test_times_that_fall_are_pooled_into_their_mean() -> None:
    """By hand: 300 and 100 violate the order; their mean is the least-squares fit."""
    curve = TimeCurve((1, 2, 3, 4), (50, 300, 100, 400))
    assert curve.fitted.tolist() == [50, 200, 200, 400]
    assert curve.at(2) == curve.at(3) == 200


@pytest.mark.parametrize("seed", range(20))
def test_the_time_never_falls(seed: int) -> None:
    random = Random(seed)
    sizes = tuple(sorted(random.sample(range(1, 500), 7)))
    curve = TimeCurve(sizes, tuple(random.randrange(1, 10**6) for _ in sizes))
    times = [curve.at(size) for size in range(600)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("sizes", "times"),
    [((), ()), ((1, 2), (3,)), ((2, 1), (3, 4)), ((1, 1), (3, 4)), ((-1,), (3,)), ((1,), (0,))],
)
def test_anything_else_than_times_at_ascending_sizes_is_refused(
    sizes: tuple[int, ...], times: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"sizes|times"):
        TimeCurve(sizes, times)
