"""The sizes of a task that fit a fraction of its cost."""

from collections.abc import Callable

import pytest

from lrc.compressors.planning.sizes import largest_within, smallest_reaching

COSTS: dict[str, Callable[[int, int], Callable[[int], int]]] = {
    "plain": lambda d_out, d_in: lambda rank: rank * (d_out + d_in),
    "pivoted": lambda d_out, d_in: lambda rank: rank * (d_out + d_in - rank),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_largest_size_is_the_largest_multiple_within_a_fraction(
    cost: str, keep: float, multiple: int
) -> None:
    for d_out, d_in in [(64, 64), (24, 80), (3, 5)]:
        price = COSTS[cost](d_out, d_in)
        fits = [
            rank
            for rank in range(multiple, min(d_out, d_in) + 1, multiple)
            if price(rank) <= keep * d_out * d_in
        ]
        rank = largest_within(price, keep * d_out * d_in, min(d_out, d_in), multiple=multiple)
        assert rank == max(fits, default=0)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_smallest_size_is_the_smallest_multiple_that_reaches_a_fraction(
    cost: str, floor: float, multiple: int
) -> None:
    for d_out, d_in in [(64, 64), (24, 80), (3, 5)]:
        price = COSTS[cost](d_out, d_in)
        reaching = [
            rank
            for rank in range(multiple, min(d_out, d_in) + 1, multiple)
            if price(rank) >= floor * d_out * d_in
        ]
        rank = smallest_reaching(price, floor * d_out * d_in, min(d_out, d_in), multiple=multiple)
        assert rank == min(reaching, default=0)
