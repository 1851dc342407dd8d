"""Budgets in time, with hand-made tables."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors.latency.latency_table import DENSE, LatencyTable, Product
from lrc.compressors.latency.time_curve import TimeCurve
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.planning import allocate as module
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.measures import BITS, MACS, Latency, measure_of
from lrc.compressors.planning.needed_products import Choices, needed_products
from lrc.compressors.planning.plan import Allocation, Plan
from lrc.compressors.planning.predicted_times import predicted_step, predicted_times
from lrc.compressors.planning.rate_distortion import Curve, Point, size_families
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.configs.errors import RecipeError

Planner = Callable[..., Plan]
SHAPES = ((64, 64), (16, 64), (96, 64), (2, 2))
INT8, INT4 = (QuantizationArgs.parse(text) for text in ("int8", "int4-g16"))
FORMS = ("low_rank", "pivoted_low_rank", "sparse", "dictionary", "semi_structured")
SCHEMES = ("", " int8", " int4-g16")
MIXED = {"method": "mixed", "components": ["low_rank", "sparse"], "schemes": ["int8", "int4-g16"]}


def table_of(slow: Sequence[str] = (), **changes: Any) -> LatencyTable:
    """Return times that are proportional to the entries of a matrix; `slow` forms take longer.

    The smallest size of a form takes 0.2 of dense, the complete matrix 1.2; integers take 0.4.
    """
    curves = {}
    for d_out, d_in in SHAPES:
        entries = d_out * d_in
        dense = 1000 * entries
        curves[(d_out, d_in), DENSE] = TimeCurve((0,), (dense,))
        for form in (f"{kind}{scheme}" for kind in ("dense", *FORMS) for scheme in SCHEMES):
            factor = 6 if form in slow else 1
            if form == DENSE:
                continue
            if form.startswith(DENSE):
                curve = TimeCurve((0,), (factor * 400 * entries,))
            else:
                largest = {"sparse": entries, "semi_structured": 8}
                end = max(largest.get(form.split(" ")[0], min(d_out, d_in)), 2)
                curve = TimeCurve((1, end), (factor * 200 * entries, factor * 1200 * entries))
            curves[(d_out, d_in), form] = curve
    common = {"device": "made up", "dtype": "bfloat16", "rows": 1, "threads": None, "versions": {}}
    return LatencyTable(**{**common, **changes}, curves=curves)


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return the options of a stage with a budget in time, and write its table."""

    def made(table: LatencyTable | None = None, **options: Any) -> dict[str, Any]:
        path = tmp_path / "times.json"
        path.write_text(json.dumps((table or table_of()).to_json()))
        return {"keep": 0.6, "measure": "latency", "latency_table": str(path), **options}

    return made


def curves(
    tasks: Sequence[LayerTask], allocations: Sequence[Allocation], *_: Any, **__: Any
) -> dict[str, Curve]:
    """Make up errors that decrease with the size; every fifth task has no comparable ones."""
    found = {}
    for number, task in enumerate(tasks):
        assert task.allocation is not None
        allocation = allocations[task.allocation]
        energies = torch.arange(min(task.stacked_shape), 0, -1, dtype=torch.float64)
        points = [
            Point(types, sizes, 50.0 / (1 + place))
            for types in allocation.types
            if "low_rank" not in types
            for _, family in size_families(task, types, allocation)
            for place, sizes in enumerate(reversed(family))
        ]
        found[task.name] = Curve(
            energies,
            1,
            comparable=number % 5 != 4,
            points=points,
            total=1e4,
            quantization={str(args): 10.0 / args.bits for args in allocation.quantization},
        )
    return found


def allocated(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(module, "curves_for", curves)
    nothing: Any = None
    return allocate(plan, nothing, nothing, nothing, device="cpu", on_step=lambda *_: None)


def time_of(plan: Plan, table: LatencyTable) -> tuple[int, int]:
    """Return the time of the weights of a plan, and that of the dense ones."""
    times = [(table.of(t.config), table.dense(t.shape)) for t in plan.tasks for _ in t.weights]
    return sum(t for t, _ in times), sum(d for _, d in times)


def test_the_cost_in_time_is_that_of_the_table() -> None:
    table = table_of()
    task = LayerTask((Weight("a", 0), Weight("b", 0)), WeightConfig((64, 64)), 16, 0, "svd")
    measure = Latency(table)
    assert task.dense_cost(measure) == 2 * 4096 * 1000
    rank = ComponentConfig("low_rank", {"rank": 22})  # a third of the way from 1 to 64
    config = WeightConfig((64, 64), (rank,))
    assert task.cost(config, measure) == 2 * round(4096 * (200 + 1000 / 3))
    int8 = WeightConfig((64, 64), (ComponentConfig("dense", {}, INT8),))
    assert task.cost(int8, measure) == 2 * 4096 * 400
    assert task.cost(WeightConfig((64, 64)), measure) == task.dense_cost(measure)


@pytest.mark.parametrize("measure", [BITS, MACS, Latency(table_of(["low_rank"]))])
def test_nothing_costs_more_than_the_dense_weight(measure: Any) -> None:
    task = LayerTask((Weight("a", 0),), WeightConfig((64, 64)), 16, 0, "svd")
    dense = task.dense_cost(measure)
    configs = [
        WeightConfig((64, 64), (ComponentConfig("low_rank", {"rank": r}),)) for r in (31, 40)
    ]
    assert all(task.cost(config, measure) <= dense for config in configs)
    assert task.cost(configs[1], measure) == dense  # larger than the weight


def test_measures_are_equal_if_their_costs_are() -> None:
    assert measure_of("bits") is BITS
    assert measure_of("macs") is MACS
    assert Latency(table_of()) == Latency(table_of())
    assert hash(Latency(table_of())) == hash(Latency(table_of()))
    assert Latency(table_of()) != Latency(table_of(["sparse"]))
    assert measure_of("latency").provisional


@pytest.mark.parametrize("slow", ["low_rank", "sparse", "dense int8", "dense int4-g16"])
@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8])
def test_a_slow_form_is_never_chosen_and_the_budget_is_kept(
    plan_of: Planner,
    stage: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    slow: str,
    keep: float,
) -> None:
    every = [f"{slow.split(' ')[0]}{scheme}" for scheme in SCHEMES]
    table = table_of([slow] if slow.startswith(DENSE) else every)
    plan = allocated(plan_of(stage(table, **MIXED, keep=keep, ignore=["*tiny"])), monkeypatch)
    forms = {
        f"{c.type} {c.quantization or ''}".strip() for t in plan.tasks for c in t.config.components
    }
    assert forms
    assert not forms & set(every if not slow.startswith(DENSE) else [slow])
    used, dense = time_of(plan, table)
    assert used <= keep * dense
    times = predicted_times(plan)
    assert times is not None
    assert times.slower_forms[slow] == 6  # of every matrix
    assert (times.seconds, times.dense_seconds) == (used / 1e9, dense / 1e9)
    assert sum(form.weights for form in times.forms) == 6
    assert sum(form.seconds for form in times.forms) == pytest.approx(times.seconds)
    for task in plan.tasks:
        assert table.of(task.config) < table.dense(task.shape) or not task.config.compressed


@pytest.mark.parametrize("allocation", ["uniform", "heavy-tail", "lagrangian"])
def test_every_allocation_and_override_counts_time(
    plan_of: Planner,
    stage: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    allocation: str,
) -> None:
    options = {"method": "svd", "allocation": allocation, "ignore": ["*tiny"]}
    options["overrides"] = [{"match": "*.q_proj", "keep": 0.4}]
    table = table_of()
    plan = allocated(plan_of(stage(**options)), monkeypatch)
    used, dense = time_of(plan, table)
    assert 0.55 * dense < used <= 0.6 * dense
    for task in plan.tasks:
        if task.name.endswith("q_proj"):
            assert 0.37 < table.of(task.config) / table.dense(task.shape) <= 0.4
    uniform = [
        table.of(task.config) / table.dense(task.shape)
        for task in plan.tasks
        if not task.name.endswith("q_proj")
    ]
    if allocation == "uniform":
        assert max(uniform) - min(uniform) < 1 / 16  # one rank of the smallest


def test_if_every_form_is_slow_the_budget_is_refused(
    plan_of: Planner, stage: Callable[..., dict[str, Any]]
) -> None:
    slow = [f"{kind}{scheme}" for kind in (DENSE, *FORMS) for scheme in SCHEMES]
    with pytest.raises(RecipeError) as refused:
        plan_of(stage(table_of(slow), **MIXED))
    (problem,) = refused.value.problems
    assert (problem.code, problem.where) == ("infeasible-budget", "stages[0].decompose.keep")
    assert "at least 1 of the time" in problem.message
    with pytest.raises(RecipeError) as refused:
        plan_of(stage(table_of(slow), method="svd"))
    assert [each.code for each in refused.value.problems] == ["nothing-smaller"]


def test_without_times_everything_is_pending(plan_of: Planner) -> None:
    options = {"keep": 0.6, "measure": "latency", "overrides": [{"match": "*.q_proj", "rank": 3}]}
    plan = plan_of(options)
    assert plan.unmeasured
    assert plan.times is None
    assert all(task.pending for task in plan.tasks)
    assert predicted_times(plan) is None
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_with_times_is_serialized_exactly(
    plan_of: Planner, stage: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for plan in (plan_of(stage(**MIXED)), allocated(plan_of(stage(**MIXED)), monkeypatch)):
        again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        assert predicted_times(again) == predicted_times(plan)
        assert not again.unmeasured


def test_a_pending_plan_predicts_its_budget(
    plan_of: Planner, stage: Callable[..., dict[str, Any]]
) -> None:
    times = predicted_times(plan_of(stage(**MIXED)))
    assert times is not None
    assert times.pending
    assert times.ratio == pytest.approx(0.6, abs=1e-6)
    saved = times.dense_seconds - times.seconds
    assert predicted_step(times.to_json(), 1.0) == pytest.approx(1.0 - saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(version=9), "'version' must be 1, got 9"),
        (lambda v: v.update(rows=4), "must have times for rows: 1, got 4"),
        (lambda v: v["entries"].pop(0), r"got none of dense \[64, 64\]; make"),
        (
            lambda v: v.update(entries=[e for e in v["entries"] if e["form"] != "low_rank int8"]),
            r"got none of low_rank int8 \[64, 64\] and 2 others",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_one_problem(
    plan_of: Planner,
    stage: Callable[..., dict[str, Any]],
    change: Callable[[dict[str, Any]], object],
    words: str,
) -> None:
    options = stage(**MIXED)
    path = Path(options["latency_table"])
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(RecipeError, match=words) as refused:
        plan_of(options)
    (problem,) = refused.value.problems
    assert problem.code == "invalid-latency-table"
    assert problem.where == "stages[0].decompose.latency_table"
    assert "lrc latency" in problem.message


def test_a_missing_file_is_one_problem(plan_of: Planner) -> None:
    options = {"keep": 0.6, "measure": "latency", "latency_table": "nowhere.json"}
    with pytest.raises(RecipeError, match="cannot be read: no such file") as refused:
        plan_of(options)
    assert [each.code for each in refused.value.problems] == ["unreadable-file"]


def test_times_of_other_versions_are_used_with_a_warning(
    plan_of: Planner, stage: Callable[..., dict[str, Any]]
) -> None:
    plan = plan_of(stage(table_of(versions={"torch": "1.0"}), **MIXED))
    (warning,) = (each for each in plan.warnings if "latency_table" in each)
    assert "torch 1.0" in warning
    assert plan.times is not None
    assert plan.times.table.device == "made up"  # foreign devices are fine


def test_a_later_quantization_is_refused(
    plan_of: Planner, stage: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(RecipeError) as refused:
        plan_of(stage(method="svd"), {"quantize": {"method": "rtn", "bits": 8}})
    assert ("contradiction", "stages[0].decompose.measure") in {
        (each.code, each.where) for each in refused.value.problems
    }


def test_all_that_a_stage_may_choose_is_needed_at_a_few_sizes() -> None:
    task = LayerTask((Weight("w", 0),), WeightConfig((64, 64)), 16, 0, "mixed")
    choices = Choices(("low_rank", "semi_structured"), (INT8, INT4), rank_multiple=2)
    found = needed_products([task, task], choices)
    sizes: dict[str, list[int]] = {}
    for product in found:
        sizes.setdefault(product.form, []).append(product.size)
    assert Product((64, 64)) in found
    assert sizes.keys() == {
        f"{kind}{scheme}" for kind in (DENSE, "low_rank", "semi_structured") for scheme in SCHEMES
    }
    assert sizes["low_rank"] == [2, 4, 8, 12, 16, 22, 30]  # 32 would take as much as dense
    assert set(sizes["low_rank int4-g16"]) == {16, 32, 48, 64}
    assert sizes["semi_structured"] == [1, 2, 3, 4, 5, 6, 7]
    assert sizes["dense int8"] == [0]
