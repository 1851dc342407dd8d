"""Plans: what is decided from shapes alone, and what is rejected."""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest

from lrc.compressors.compress.layerwise import compress_layers
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.errors import Problem, RecipeError
from lrc.configs.recipe import Recipe

Planner = Callable[..., Plan]


def rank(task: LayerTask) -> int | None:
    return task.config.sizes.get("rank")


def test_no_weight_takes_more_than_its_fraction_and_the_total_is_counted(plan_of: Planner) -> None:
    plan = plan_of({"keep": 0.5})
    assert len(plan.tasks) == 8
    for task in plan.tasks:
        found = rank(task)
        if found is not None:
            numbers = found * sum(task.shape)
            assert task.bits == 16 * numbers + 8 <= 0.5 * task.dense_bits  # and the sentinel
    assert plan.bits == sum(task.bits for task in plan.tasks)
    assert plan.kept == plan.bits / plan.dense_bits
    assert plan.model.bytes - plan.compressed_bytes == (plan.dense_bits - plan.bits) // 8


def test_a_weight_too_small_for_any_rank_stays_dense_with_a_note(plan_of: Planner) -> None:
    tiny = [task for task in plan_of({"keep": 0.5}).tasks if task.name.endswith("tiny")]
    assert {task.config.types for task in tiny} == {"dense"}
    assert not any(task.compressed for task in tiny)
    assert tiny[0].note == "too small: rank 1 needs more than 50% of its bits"
    assert tiny[0].bits == tiny[0].dense_bits


def test_factors_larger_than_the_weight_are_not_planned(plan_of: Planner) -> None:
    override = {"match": "*.q_proj", "rank": 33}  # 33 (64 + 64) > 64 * 64
    plan = plan_of({"keep": 0.5, "overrides": [override]})
    q = plan.tasks[0]
    assert not q.compressed
    assert q.note == "factors of rank 33 would be larger than the weight"


def test_ignored_weights_do_not_count(plan_of: Planner) -> None:
    plan = plan_of({"keep": 0.5, "ignore": ["*.k_proj", "*tiny"]})
    assert [task.name for task in plan.tasks] == [
        f"layers.{layer}.{name}" for layer in range(2) for name in ("attn.q_proj", "mlp.up_proj")
    ]


def test_the_first_override_that_matches_wins(plan_of: Planner) -> None:
    overrides = [{"match": "layers.0.*q_proj", "rank": 3}, {"match": "*q_proj", "keep": 1.0}]
    plan = plan_of({"keep": 0.5, "overrides": overrides})
    q = [task for task in plan.tasks if task.name.endswith("q_proj")]
    assert (rank(q[0]), rank(q[1]), q[1].note) == (3, None, "keep is 1")


def test_two_stages_share_the_model(plan_of: Planner) -> None:
    first = {"keep": 0.5, "targets": ["*attn*"]}
    plan = plan_of(first, {"keep": 0.7, "targets": ["*mlp*"]})
    assert [t.stage for t in plan.tasks] == [0, 0, 1, 0, 0, 1]  # in the order of the model


@pytest.fixture
def problems(plan_of: Planner) -> Callable[..., list[Problem]]:
    """Return the problems of stages."""

    def found(*stages: dict[str, Any]) -> list[Problem]:
        with pytest.raises(RecipeError) as caught:
            plan_of(*stages)
        return caught.value.problems

    return found


def test_a_weight_belongs_to_one_stage(problems: Callable[..., list[Problem]]) -> None:
    (problem,) = problems({"keep": 0.5}, {"keep": 0.5, "targets": ["*.q_proj"]})
    assert (problem.code, problem.where) == ("already-targeted", "stages[1].decompose.targets")
    assert "stages[0]" in problem.message


def test_all_problems_are_reported_together(problems: Callable[..., list[Problem]]) -> None:
    found = problems(
        {
            "keep": 0.5,
            "ignore": ["*.q_porj"],
            "overrides": [{"match": "*.k_proj", "rank": 17}, {"match": "*nothing*", "rank": 1}],
        }
    )
    messages = {(each.code, each.where): each.message for each in found}
    where = "stages[0].decompose"
    assert messages.keys() == {
        ("no-match", f"{where}.ignore"),
        ("no-match", f"{where}.overrides[1].match"),
        ("rank-out-of-range", f"{where}.overrides[0].rank"),
    }
    assert "'*.q_porj'" in messages["no-match", f"{where}.ignore"]
    assert "did you mean '*.q_proj'?" in messages["no-match", f"{where}.ignore"]
    assert "'*nothing*'" in messages["no-match", f"{where}.overrides[1].match"]
    out_of_range = messages["rank-out-of-range", f"{where}.overrides[0].rank"]
    assert "[1, 16]" in out_of_range
    assert "(and 1 more of this kind)" in out_of_range  # the second layer's k_proj


def test_a_plan_that_makes_nothing_smaller_is_rejected(
    problems: Callable[..., list[Problem]],
) -> None:
    (problem,) = problems({"keep": 1.0})
    assert (problem.code, problem.where) == ("nothing-smaller", "stages")


def test_few_calibration_tokens_are_a_warning(plan_of: Planner) -> None:
    assert plan_of({"keep": 0.5, "method": "svd"}, samples=1, length=8).warnings == []
    warnings = plan_of({"keep": 0.5, "method": "svd-llm"}, samples=1, length=8).warnings
    assert len(warnings) == 1  # the tiny weights stay dense but would have had enough
    assert "8 tokens are few" in warnings[0]
    assert "input width 64; 256 or more are advised" in warnings[0]


@pytest.mark.parametrize(("method", "expected"), [("svd-llm", 1), ("wanda", 1), ("kfac", 0)])
def test_an_allocation_by_incomparable_losses_is_a_warning(
    plan_of: Planner, method: str, expected: int
) -> None:
    stage = {"method": method, "keep": 0.5, "allocation": "lagrangian"}
    warnings = plan_of(stage).warnings
    found = [text for text in warnings if text.startswith("stages[0].decompose.allocation: ")]
    assert len(found) == expected


LINEARS = 2 * (64 * 64 + 16 * 64 + 96 * 64 + 2 * 2)


@pytest.mark.parametrize("measure", ["bits", "macs"])
def test_pivoted_factors_have_more_rank_for_the_same_budget(plan_of: Planner, measure: str) -> None:
    plain = plan_of({"keep": 0.5, "measure": measure})
    pivoted = plan_of({"keep": 0.5, "measure": measure, "storage": "pivoted_low_rank"})
    for m, p in zip(plain.tasks, pivoted.tasks, strict=True):
        low, high = rank(m), rank(p)
        if low is not None and high is not None:
            assert (m.config.types, p.config.types) == ("low_rank", "pivoted_low_rank")
            assert high >= low
            cost = p.bits if measure == "bits" else p.config.multiply_adds()
            dense = p.dense_bits if measure == "bits" else p.shape[0] * p.shape[1]
            assert cost <= 0.5 * dense
            assert p.bits < p.dense_bits
    ranks = [sum(rank(task) or 0 for task in plan.tasks) for plan in (plain, pivoted)]
    assert ranks[1] > 1.1 * ranks[0]  # measured 1.13 and 1.15


def test_ranks_are_multiples(plan_of: Planner) -> None:
    ranks = [rank(task) for task in plan_of({"keep": 0.5, "rank_multiple": 4}).tasks]
    assert all(each is None or each % 4 == 0 for each in ranks)
    assert len({each for each in ranks if each}) > 1


@pytest.mark.parametrize("allocation", ["lagrangian", "heavy-tail"])
def test_an_allocation_leaves_ranks_pending_within_a_budget(
    plan_of: Planner, allocation: str
) -> None:
    override = {"match": "*.q_proj", "rank": 8}
    plan = plan_of({"keep": 0.5, "allocation": allocation, "overrides": [override]})
    fixed = [task for task in plan.tasks if task.name.endswith("q_proj")]
    rest = [task for task in plan.tasks if task not in fixed]
    assert {(task.allocation, rank(task)) for task in fixed} == {(None, 8)}
    assert {(task.allocation, rank(task), task.types) for task in rest} == {(0, None, "low_rank")}
    assert all(task.pending and task.compressed for task in rest)
    (found,) = plan.allocations
    assert (found.allocator, found.types) == (allocation, ("low_rank",))
    assert found.budget == int(0.5 * LINEARS * 16) - sum(task.bits for task in fixed)
    assert 0.49 < plan.kept <= 0.5  # of pending tasks the average fraction counts
    assert plan.modules().keys() == {task.name for task in fixed}


@pytest.mark.parametrize("allocation", ["uniform", "lagrangian"])
def test_a_size_leaves_what_the_rest_of_the_file_does_not_take(
    plan_of: Planner, allocation: str
) -> None:
    plan = plan_of({"size": "43kB", "allocation": allocation})
    rest = plan.model.bytes - plan.dense_bits // 8
    spent = plan.allocations[0].budget if plan.allocations else plan.bits
    assert bool(plan.allocations) == (allocation == "lagrangian")
    headers = 43_000 - rest - spent / 8
    assert 0 < headers < 6000  # of 20 and more tensors
    assert 0.3 < plan.kept < 0.7


def test_biases_that_the_source_lacks_are_counted(plan_of: Planner) -> None:
    for lord, svd in zip(
        plan_of({"keep": 0.5, "method": "lord"}).tasks,
        plan_of({"keep": 0.5}).tasks,
        strict=True,
    ):
        found = rank(lord)
        if found is not None:
            assert lord.config.bias
            assert not lord.source_bias
            assert lord.bits <= 0.5 * lord.dense_bits
            without = replace(lord, config=replace(lord.config, bias=False))
            assert lord.bits == without.bits + lord.shape[0] * 16
            assert lord.parameters == without.parameters + lord.shape[0]
            assert found <= (rank(svd) or 0)


def test_later_phases_read_the_plan_only(plan_of: Planner) -> None:
    """Allocation and compression take no recipe: a task names method, options and seed."""
    for phase in (allocate, compress_layers):
        types = [p.annotation for p in signature(phase).parameters.values()]
        assert Plan in types
        assert Recipe not in types
    plan = plan_of({"method": "cospadi", "keep": 0.5, "rounds": 7})
    assert plan.seed == 0
    for task in plan.tasks:
        assert (task.method, task.types) == ("cospadi", "dictionary")
        assert task.options == {"damp": 1e-6, "rounds": 7, "seed": 0}
        assert task.statistics == (("inputs", "whole_inputs") if task.compressed else ())


WHERE = "stages[0].decompose"
REJECTED: dict[str, tuple[list[dict[str, Any]], str, str, str]] = {
    "no rank of that multiple": (
        [{"keep": 0.5, "rank_multiple": 64}],
        "out-of-range",
        f"{WHERE}.rank_multiple",
        "[1, 38]",
    ),
    "multiples that cost too much": (
        [{"keep": 0.2, "rank_multiple": 24, "allocation": "lagrangian"}],
        "infeasible-budget",
        f"{WHERE}.keep",
        "at least 0.7",
    ),
    "nothing left by the multiple": (
        [{"keep": 0.2, "rank_multiple": 24}],
        "nothing-smaller",
        "stages",
        "lower 'rank_multiple', or raise 'keep'",
    ),
    "a floor between two ranks": (
        [{"keep": 0.5, "rank_multiple": 10, "min_keep": 0.49}],
        "infeasible-budget",
        f"{WHERE}.min_keep",
        "layers.0.",
    ),
    "a floor above the size": (
        [{"size": "30kB", "min_keep": 0.9, "allocation": "lagrangian"}],
        "infeasible-budget",
        f"{WHERE}.size",
        "30kB",
    ),
    "a cap without predictions": (
        [{"keep": 0.5, "max_relative_error": 0.1}],
        "contradiction",
        f"{WHERE}.max_relative_error",
        "allocation: lagrangian",
    ),
    "overrides that take it all": (
        [
            {
                "keep": 0.2,
                "allocation": "lagrangian",
                "overrides": [{"match": "*.q_proj", "keep": 0.9}],
            }
        ],
        "infeasible-budget",
        f"{WHERE}.keep",
        "in addition to what the overrides fix",
    ),
    "a size that the rest exceeds": (
        [{"size": "10kB"}],
        "infeasible-size",
        f"{WHERE}.size",
        "raise size",
    ),
    "a size above the dense model": (
        [{"size": "1GB"}],
        "infeasible-size",
        f"{WHERE}.size",
        "got 1GB; lower size",
    ),
    "a size for two stages": (
        [{"size": "43kB", "targets": ["*mlp*"]}, {"keep": 0.5, "targets": ["*attn*"]}],
        "contradiction",
        f"{WHERE}.size",
        "keep",
    ),
    "atoms that leave no room for coefficients": (
        [{"method": "dictionary", "keep": 0.5, "ratio": [2, 70], "targets": ["*q_proj"]}],
        "out-of-range",
        f"{WHERE}.ratio",
        "[1, 61]",
    ),
    "nothing left by the atoms": (
        [{"method": "compot", "keep": 0.4, "allocation": "uniform", "ratio": 50}],
        "nothing-smaller",
        "stages",
        "raise 'keep' or 'size', or lower 'ratio'",
    ),
    "groups larger than the model": (
        [{"method": "basis-sharing", "keep": 0.5, "layers_per_group": 3}],
        "out-of-range",
        f"{WHERE}.layers_per_group",
        "at most 2",
    ),
    "groups of dictionaries larger than the model": (
        [{"method": "cospadi", "keep": 0.5, "layers_per_group": 3}],
        "out-of-range",
        f"{WHERE}.layers_per_group",
        "at most 2",
    ),
    "means of the dense model after a compressed prefix": (
        [{"method": "lord", "keep": 0.5, "compensate": {}}],
        "contradiction",
        f"{WHERE}.method",
        "compensate",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_infeasible_options_are_rejected_with_a_remedy(
    problems: Callable[..., list[Problem]], case: str
) -> None:
    stages, code, where, part = REJECTED[case]
    (problem,) = problems(*stages)
    assert (problem.code, problem.where) == (code, where)
    assert part in problem.message
    assert ";" in problem.message


def test_problems_of_several_stages_are_reported_together(
    problems: Callable[..., list[Problem]],
) -> None:
    found = problems(
        {"keep": 0.5, "max_relative_error": 0.1, "targets": ["*mlp*"]},
        {"keep": 0.1, "allocation": "lagrangian", "rank_multiple": 60, "targets": ["*attn*"]},
    )
    assert [(each.code, each.where) for each in found] == [
        ("contradiction", "stages[0].decompose.max_relative_error"),
        ("out-of-range", "stages[1].decompose.rank_multiple"),
    ]
