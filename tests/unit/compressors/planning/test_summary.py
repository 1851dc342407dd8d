"""One row per weight: sizes that add up to those of the plan."""

from collections.abc import Callable
from typing import Any

import pytest

from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.summary import summarize
from lrc.compressors.planning.tasks import LayerResult

Planner = Callable[..., Plan]

STAGES: dict[str, list[dict[str, Any]]] = {
    "ranks": [{"keep": 0.5}],
    "biases": [{"method": "lord", "keep": 0.5}],
    "pending": [{"method": "kfac", "keep": 0.5}],
    "shared factors": [{"method": "basis-sharing", "keep": 0.5}],
    "shared dictionaries": [{"method": "cospadi", "keep": 0.7, "layers_per_group": 3}],
    "integers": [{"quantize": {"method": "gptq", "bits": 4, "ignore": ["*tiny"]}}],
    "quantized factors": [
        {"method": "basis-sharing", "keep": 0.5},
        {"quantize": {"method": "rtn", "bits": 8, "ignore": ["*tiny"]}},
    ],
}


@pytest.mark.parametrize("case", STAGES)
def test_rows_add_up_to_the_plan_in_the_order_of_layers(plan_of: Planner, case: str) -> None:
    plan = plan_of(*STAGES[case], layers=4)
    rows = summarize(plan)
    assert sum(row.bits for row in rows) == pytest.approx(plan.bits, abs=len(rows))
    assert sum(row.dense_bits for row in rows) == plan.dense_bits
    assert [row.layer for row in rows] == sorted(row.layer for row in rows)
    assert len({row.name for row in rows}) == len(rows) == sum(len(t.weights) for t in plan.tasks)
    modules = plan.modules()
    assert modules == {row.name: row.config for row in rows if row.config.compressed}
    layers = plan.owner_layers()
    tasks = {task.name: task for task in plan.tasks}
    assert all(layers[row.name] == tasks[row.owner].layer for row in rows)


def test_members_of_a_group_name_the_owner_of_their_factor(plan_of: Planner) -> None:
    rows = summarize(plan_of({"method": "basis-sharing", "keep": 0.5}))
    first, second = (row for row in rows if row.name.endswith("up_proj"))
    assert (first.owner, second.owner) == (first.name, first.name)
    assert (first.config.shares, second.config.shares) == (None, first.name)
    assert first.bits > second.bits
    assert first.rank == second.rank


def test_rows_show_the_allocator_while_pending_and_results_afterwards(plan_of: Planner) -> None:
    pending = summarize(plan_of({"method": "kfac", "keep": 0.5}))
    assert {row.allocator for row in pending} == {"lagrangian"}
    plan = plan_of({"keep": 0.5})
    assert {row.allocator for row in summarize(plan)} == {None}
    task = plan.tasks[0]
    result = LayerResult(task.kept_dense().config, fallback="saw no calibration token; stays dense")
    row = summarize(plan.with_results({task.name: result}))[0]
    assert (row.name, row.rank, row.bits) == (task.name, None, task.dense_bits)
    assert row.to_json()["fallback"] == result.fallback
