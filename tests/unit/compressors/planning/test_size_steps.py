"""Sizes of a task as steps: the largest within a budget, and families with two sizes."""

import pytest

from lrc.compressors.layers import WeightConfig
from lrc.compressors.methods.size_families import (
    SUM_RATIO,
    components_at,
    largest_step,
    pivoted_rank,
)
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask, Weight

SUM = "pivoted_low_rank+sparse"


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (3, 5)])
def test_the_rank_is_the_largest_within_the_budget(shape: tuple[int, int], keep: float) -> None:
    task = LayerTask((Weight("a", 0),), WeightConfig(shape), 16, 0, "svd", "low_rank")
    steps = SizeSteps(task, "low_rank")
    budget = keep * shape[0] * shape[1] * 16

    def stored(rank: int) -> int:
        return steps.config(rank).stored_bits(16)

    rank = steps.within(keep, BITS)
    assert steps.config(3).sizes == {"rank": 3}
    assert rank == 0 or stored(rank) <= budget
    if rank < min(shape):
        assert stored(rank + 1) > budget


@pytest.mark.parametrize(("d_out", "d_in"), [(576, 576), (1536, 576), (576, 1536), (1, 9), (7, 1)])
@pytest.mark.parametrize("ratio", [0.02, SUM_RATIO, 1.0, 2.0])
def test_the_rank_of_a_sum_is_the_largest_whose_numbers_are_within_the_ratio(
    d_out: int, d_in: int, ratio: float
) -> None:
    largest = largest_step(SUM, d_out, d_in)
    steps = sorted(
        {1, 2, 100, largest // 7, largest // 2, largest - 1, largest} & {*range(1, largest + 1)}
    )
    for step in steps:
        rank, most = pivoted_rank(int(ratio * step), d_out, d_in), min(d_out, d_in)
        assert 1 <= rank <= most
        assert rank == 1 or rank * (d_out + d_in - rank) <= ratio * step
        assert rank == most or (rank + 1) * (d_out + d_in - rank - 1) > int(ratio * step)
        if ratio == SUM_RATIO:
            low, entries = components_at(SUM, step, d_out, d_in)
            assert (low.sizes, entries.sizes) == ({"rank": rank}, {"nonzeros": step})
    if ratio >= 1:
        assert pivoted_rank(int(ratio * largest), d_out, d_in) == min(d_out, d_in)


def test_other_sums_have_no_family_of_sizes() -> None:
    with pytest.raises(ValueError, match=r"no sizes for sparse\+dictionary"):
        components_at("sparse+dictionary", 1, 8, 8)
