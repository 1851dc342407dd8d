"""Choices for several budgets with pivot rows for the smallest and a refinement for the others."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from lrc.compressors.layers import WeightConfig
from lrc.compressors.planning.allocators import BudgetError, lagrangian
from lrc.compressors.planning.candidates import Candidate, candidates_for
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.refinements import (
    elastic_config,
    refined,
    refined_choices,
)
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask, Weight

KEEPS = (0.9, 0.8, 0.6)


def allocation(tasks: list[LayerTask], **changes: Any) -> Allocation:
    total = sum(task.dense_bits for task in tasks)
    values = {
        "stage": 0,
        "allocator": "lagrangian",
        "budget": int(KEEPS[0] * total),
        "measure": BITS,
        "types": ("pivoted_low_rank",),
        "quantization": (),
        "ratios": (2.0,),
        "rank_multiple": 1,
        "group_multiple": 1,
        "min_keep": 0.0,
        "max_relative_error": 1.0,
        "keep": KEEPS[0],
        "total": total,
        "elastic": KEEPS,
    }
    return Allocation(**{**values, **changes})


def task(number: int, shape: tuple[int, int]) -> LayerTask:
    return LayerTask(
        weights=(Weight(f"layer.{number}", number),),
        config=WeightConfig(shape),
        number_bits=16,
        stage=0,
        method="kfac",
        types="pivoted_low_rank",
    )


def curve_of(energies: torch.Tensor) -> Curve:
    return Curve(energies, n_tokens=100, total=float(energies.sum()))


@pytest.fixture
def weights() -> tuple[list[LayerTask], list[Curve]]:
    """Return tasks of three shapes and curves with different decays."""
    shapes = [(48, 48), (96, 48), (48, 96), (24, 48), (48, 48), (96, 48)]
    tasks = [task(number, shape) for number, shape in enumerate(shapes)]
    decays = [0.8, 0.9, 0.95, 0.85, 0.999, 0.97]
    curves = [
        curve_of(decay ** torch.arange(min(shape), dtype=torch.float64))
        for decay, shape in zip(decays, shapes, strict=True)
    ]
    return tasks, curves


def choose(
    tasks: list[LayerTask], curves: list[Curve], budgets: list[int], multiple: int = 1
) -> tuple[list[list[Candidate]], list[tuple[WeightConfig, Candidate]]]:
    found = allocation(tasks)
    offers = [candidates_for(t, c, found) for t, c in zip(tasks, curves, strict=True)]
    return offers, refined_choices(offers, tasks, curves, budgets, BITS, multiple=multiple)


def lost(curve: Curve, config: WeightConfig) -> float:
    return float(curve.energies[config.sizes["rank"] :].sum()) if config.compressed else 0.0


def test_every_budget_is_met_and_the_smallest_is_the_separate_optimum(
    weights: tuple[list[LayerTask], list[Curve]],
) -> None:
    tasks, curves = weights
    budgets = [each.budget for each in allocation(tasks).all_budgets]
    offers, chosen = choose(tasks, curves, budgets)
    losses = []
    for index, budget in enumerate(budgets):
        configs = [config.at_budget(index) for config, _ in chosen]
        assert sum(t.bits_of(c) for t, c in zip(tasks, configs, strict=True)) <= budget
        losses.append(sum(lost(curve, c) for curve, c in zip(curves, configs, strict=True)))
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
    for (config, largest), curve in zip(chosen, curves, strict=True):
        assert largest.loss == pytest.approx(lost(curve, config.at_budget(0)), rel=1e-9)
    separate = lagrangian(offers, budgets[-1])
    for (config, _), offered, index in zip(chosen, offers, separate, strict=True):
        assert config.at_budget(-1) == offered[index].config


def test_ranks_do_not_increase_and_are_multiples(
    weights: tuple[list[LayerTask], list[Curve]],
) -> None:
    tasks, curves = weights
    budgets = [each.budget for each in allocation(tasks).all_budgets]
    _, chosen = choose(tasks, curves, budgets, multiple=4)
    tables = [config.components[1].ranks for config, _ in chosen if config.elastic]
    assert tables
    for ranks in tables:
        assert ranks[-1] == 0
        assert all(high >= low for high, low in pairwise(ranks))
        assert all(rank % 4 == 0 for rank in ranks)


def test_a_dense_weight_stays_dense_at_all_budgets(
    weights: tuple[list[LayerTask], list[Curve]],
) -> None:
    tasks, curves = weights
    budgets = [each.budget for each in allocation(tasks).all_budgets]
    flat = [curve_of(1e9 * torch.ones_like(curves[0].energies)), *curves[1:]]
    _, chosen = choose(tasks, flat, budgets)
    assert not chosen[0][0].compressed
    assert any(config.elastic for config, _ in chosen)


def test_a_budget_below_the_cheapest_candidates_is_refused(
    weights: tuple[list[LayerTask], list[Curve]],
) -> None:
    with pytest.raises(BudgetError):
        choose(*weights, [10**6, 10])


def test_equal_fractions_give_at_each_budget_what_a_separate_weight_takes() -> None:
    one = task(0, (48, 96))
    steps = SizeSteps(one, "pivoted_low_rank")
    separate = [steps.config(steps.within(keep, BITS)) for keep in KEEPS]
    config = elastic_config(one, separate, allocation([one]))
    assert config is not None
    assert config.at_budget(-1) == separate[-1]
    for index, alone in enumerate(separate):
        cut = config.at_budget(index)
        assert one.bits_of(cut) <= one.bits_of(alone)
    larger = refined(separate[-1], [config.components[1].ranks[0] + 1])
    assert one.bits_of(larger) > one.bits_of(separate[0])


def test_a_weight_without_refinement_is_that_of_the_smallest_budget() -> None:
    alone = SizeSteps(task(0, (48, 96)), "pivoted_low_rank").config(7)
    assert refined(alone, [0, 0]) == alone
    config = refined(alone, [5, 3, 0])
    assert WeightConfig.from_json(config.to_json()) == config
    assert [config.at_budget(i).sizes["rank"] for i in range(3)] == [12, 10, 7]
