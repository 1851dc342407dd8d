"""Plans of shared factors, of patterns and of dictionaries: their sizes from shapes alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.errors import RecipeError

Planner = Callable[..., Plan]


def tasks_of(plan: Plan, leaf: str) -> list[LayerTask]:
    return [task for task in plan.tasks if task.name.endswith(leaf)]


def groups_of(tasks: list[LayerTask]) -> list[list[int]]:
    """Return the layers of every task."""
    return [[weight.layer for weight in task.weights] for task in tasks]


def test_the_same_weight_of_consecutive_layers_shares_a_factor(plan_of: Planner) -> None:
    plan = plan_of({"method": "basis-sharing", "keep": 0.5}, layers=5)
    up = tasks_of(plan, "up_proj")
    assert groups_of(up) == [[0, 1], [2, 3], [4]]
    assert {task.config.types for task in up} == {"low_rank"}
    modules = plan.modules()
    shares = [modules[weight.name].shares for task in up for weight in task.weights]
    assert shares == [None, up[0].name, None, up[1].name, None]
    assert up[0].bits <= 0.5 * up[0].dense_bits
    assert up[0].bits == sum(modules[weight.name].stored_bits(16) for weight in up[0].weights)
    assert up[0].config.sizes["rank"] > up[2].config.sizes["rank"]  # sharing pays for rank


def test_the_same_weight_of_consecutive_layers_shares_a_dictionary(plan_of: Planner) -> None:
    plan = plan_of({"method": "cospadi", "keep": 0.7, "layers_per_group": 3}, layers=4)
    three, one = tasks_of(plan, "up_proj")
    assert groups_of([three, one]) == [[0, 1, 2], [3]]
    assert {task.config.types for task in (three, one)} == {"dictionary"}
    assert three.dense_bits == 3 * one.dense_bits
    assert three.bits <= 0.7 * three.dense_bits
    last = plan.modules()[three.weights[2].name]
    assert last.to_json()["components"] == [
        {"type": "dictionary", **three.config.sizes, "shares": three.name}
    ]
    sizes = three.config.sizes
    assert sizes["nonzeros"] > one.config.sizes["nonzeros"]  # sharing pays for coefficients
    # Up to as many atoms as the layers together have outputs, and no more than inputs.
    k = tasks_of(plan, "k_proj")[0]
    assert k.shape[0] < k.config.sizes["atoms"] <= k.shape[1]


def test_groups_of_one_layer_share_nothing(plan_of: Planner) -> None:
    stage = {"method": "cospadi", "keep": 0.5}
    assert plan_of({**stage, "layers_per_group": 1}) == plan_of(stage)


@pytest.mark.parametrize(
    ("options", "types"),
    [
        ({"method": "svd"}, "low_rank"),
        ({"method": "svd", "storage": "pivoted_low_rank"}, "pivoted_low_rank"),
        ({"method": "mixed"}, "pivoted_low_rank"),
        ({"method": "mixed", "components": ["sparse", "low_rank"]}, "low_rank"),
        ({"method": "wanda"}, "sparse"),
        ({"method": "rocket"}, "dictionary"),
    ],
)
def test_the_recipe_determines_the_component_types_of_a_plan(
    plan_of: Planner, options: dict[str, Any], types: str
) -> None:
    plan = plan_of({"keep": 0.5, **options})
    assert {task.types for task in plan.tasks if task.compressed} == {types}
    decided = [task for task in plan.tasks if task.compressed and not task.pending]
    assert {task.config.types for task in decided} <= {types}


@pytest.mark.parametrize("method", ["basis-sharing", "cospadi"])
def test_groups_of_unequal_shapes_are_rejected(plan_of: Planner, method: str) -> None:
    stage = {"method": method, "keep": 0.5, "layers_per_group": 2}
    other = {"layers.1.mlp.up_proj": (80, 64)}
    with pytest.raises(RecipeError) as caught:
        plan_of(stage, layers=3, other=other)
    (problem,) = caught.value.problems
    assert problem.code == "unequal-shapes"
    assert problem.where == "stages[0].decompose.layers_per_group"
    names = "layers.0.mlp.up_proj [96, 64] and layers.1.mlp.up_proj [80, 64]"
    assert names in problem.message
    assert problem.message.endswith("(and 1 more of this kind)")
    # Both remedies help, and layers that would not share anyway do not matter.
    ignored = plan_of({**stage, "ignore": ["layers.1.*up_proj"]}, layers=3, other=other)
    assert sum(len(task.weights) for task in ignored.tasks) == 3 * 4 - 1
    apart = {**stage, "ignore": ["layers.1.*"]}, {**stage, "targets": ["layers.1.*"]}
    assert all(len(t.weights) == 1 for t in plan_of(*apart, layers=3, other=other).tasks)
    full = plan_of(stage, layers=4, other={f"layers.{i}.mlp.up_proj": (80, 64) for i in (2, 3)})
    assert groups_of(tasks_of(full, "up_proj")) == [[0, 1], [2, 3]]


def test_groups_do_not_cross_ignored_or_overridden_layers(plan_of: Planner) -> None:
    overrides = [{"match": "layers.4.*.up_proj", "keep": 0.3}]
    stage = {
        "method": "basis-sharing",
        "keep": 0.5,
        "ignore": ["layers.1.*"],
        "layers_per_group": 3,
    }
    plan = plan_of({**stage, "overrides": overrides}, layers=6)
    assert groups_of(tasks_of(plan, "up_proj")) == [[0], [2, 3], [4], [5]]


TWO_OF_FOUR = {"method": "sparse", "pattern": "2:4", "ignore": ["*tiny"]}


def test_pruned_two_of_four_every_weight_has_its_one_size(plan_of: Planner) -> None:
    plan = plan_of({**TWO_OF_FOUR, "keep": 0.6, "allocation": "uniform"})
    for task in plan.tasks:
        (component,) = task.config.components
        assert (component.type, component.pattern) == ("sparse", "2:4")
        assert component.sizes == {"nonzeros": task.shape[0] * task.shape[1] // 2}
        assert task.bits == task.dense_bits * 9 // 16 + 8
    patterns = {c.pattern for config in plan.modules().values() for c in config.components}
    assert patterns == {"2:4"}
    pending = plan_of({**TWO_OF_FOUR, "keep": 0.6})
    assert all(task.pending for task in pending.tasks)
    assert [each.allocator for each in pending.allocations] == ["lagrangian"]


def test_without_a_pattern_no_record_has_one(plan_of: Planner) -> None:
    plan = plan_of({"method": "magnitude", "keep": 0.6})
    assert {task.pattern for task in plan.tasks} == {None}
    assert not any("pattern" in str(config.to_json()) for config in plan.modules().values())


def test_dictionaries_two_of_four_stay_within_their_fraction(plan_of: Planner) -> None:
    stage = {**TWO_OF_FOUR, "method": "dictionary", "keep": 0.6, "allocation": "uniform"}
    for task in plan_of(stage).tasks:
        (component,) = task.config.components
        sizes = component.sizes
        assert sizes["atoms"] % 4 == 0
        assert sizes["nonzeros"] == sizes["atoms"] // 2
        assert task.bits <= 0.6 * task.dense_bits
        larger = {name: size + size // sizes["nonzeros"] * 2 for name, size in sizes.items()}
        config = task.with_components((replace(component, sizes=larger),))
        assert task.bits_of(config) > 0.6 * task.dense_bits


WHERE = "stages[0].decompose"
PATTERN_REJECTED: dict[str, tuple[dict[str, Any], str, str, list[str]]] = {
    "a fraction below the one size": (
        {"keep": 0.5, "allocation": "uniform"},
        "infeasible-budget",
        f"{WHERE}.keep",
        ["at least 0.563", "layers.0.attn.k_proj [16, 64]", "got 0.5", "(and 5 more"],
    ),
    "a budget below the one size": (
        {"keep": 0.5},
        "infeasible-budget",
        f"{WHERE}.keep",
        ["at least 0.5627", "got 0.5"],
    ),
    "an override below the one size": (
        {"keep": 0.8, "overrides": [{"match": "*.q_proj", "keep": 0.3}]},
        "infeasible-budget",
        f"{WHERE}.overrides[0].keep",
        ["at least 0.5627", "layers.0.attn.q_proj [64, 64]", "got 0.3", "(and 1 more"],
    ),
    "a number of inputs not divisible by four": (
        {"keep": 0.8, "ignore": []},
        "pattern-mismatch",
        f"{WHERE}.pattern",
        ["layers.0.tiny", "[2, 2]", "pattern: unstructured", "(and 1 more"],
    ),
    "fewer than four atoms": (
        {"method": "compot", "keep": 0.8, "ignore": []},
        "pattern-mismatch",
        f"{WHERE}.pattern",
        ["layers.0.tiny", "[2, 2]", "pattern: unstructured", "(and 1 more"],
    ),
    "a floor above the one size": (
        {"keep": 0.8, "min_keep": 0.7},
        "infeasible-budget",
        f"{WHERE}.keep",
        ["at least 1 of", "got 0.8", "'min_keep' (0.7)"],
    ),
}


@pytest.mark.parametrize("case", PATTERN_REJECTED)
def test_budgets_and_shapes_without_a_size_of_the_pattern_are_rejected(
    plan_of: Planner, case: str
) -> None:
    changes, code, where, parts = PATTERN_REJECTED[case]
    with pytest.raises(RecipeError) as caught:
        plan_of({**TWO_OF_FOUR, **changes})
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (code, where)
    for part in parts:
        assert part in problem.message


@pytest.mark.parametrize("stage", [{}, {"allocation": "uniform"}])
def test_the_smallest_fraction_that_is_named_can_be_met(
    plan_of: Planner, stage: dict[str, Any]
) -> None:
    least = 0.5627 if not stage else 0.563
    plan = plan_of({**TWO_OF_FOUR, **stage, "keep": least})
    assert plan.kept <= least


@pytest.mark.parametrize("method", ["cospadi", "compot", "rocket", "dictionary"])
@pytest.mark.parametrize("ratio", [1, 1.5, 2.5, 4])
def test_dictionaries_have_the_requested_ratio(plan_of: Planner, method: str, ratio: float) -> None:
    stage = {"method": method, "keep": 0.6, "allocation": "uniform", "ratio": ratio}
    sized = [task for task in plan_of(stage).tasks if task.config.compressed]
    assert len(sized) == 6  # all but the tiny ones
    for task in sized:
        sizes = task.config.sizes
        assert sizes["atoms"] == min(round(ratio * sizes["nonzeros"]), *task.shape)
        assert task.bits == task.config.stored_bits(16) <= 0.6 * task.dense_bits


def test_published_methods_have_twice_as_many_atoms_by_default_and_ours_three_times(
    plan_of: Planner,
) -> None:
    for method, ratio in (("cospadi", 2), ("compot", 2), ("rocket", 2), ("dictionary", 3)):
        plan = plan_of({"method": method, "keep": 0.5, "allocation": "uniform"})
        (sizes,) = {tuple(t.config.sizes.items()) for t in plan.tasks if t.shape == (64, 64)}
        assert dict(sizes)["atoms"] == ratio * dict(sizes)["nonzeros"]


def test_several_ratios_are_left_to_the_allocation(plan_of: Planner) -> None:
    plan = plan_of({"method": "dictionary", "keep": 0.6, "ratio": [3, 1.5]})
    assert {task.allocation for task in plan.tasks} == {0}
    (allocation,) = plan.allocations
    assert (allocation.allocator, allocation.ratios) == ("lagrangian", (1.5, 3))


def test_the_note_of_a_weight_that_is_too_small_names_the_smallest_dictionary(
    plan_of: Planner,
) -> None:
    plan = plan_of({"method": "dictionary", "keep": 0.5, "allocation": "uniform", "ratio": 20})
    notes = {task.name: task.note for task in plan.tasks if task.note}
    assert notes["layers.0.attn.k_proj"] == (
        "too small: 1 of 16 atoms needs more than 50% of its bits"
    )
