"""`keep` means the same for every allocation: the total, overrides included, is met from below."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import product
from random import Random
from typing import Any

import pytest
import torch

from lrc.compressors.planning import allocate as module
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.measures import measure_of
from lrc.compressors.planning.plan import Allocation, Plan
from lrc.compressors.planning.rate_distortion import Curve, Point, size_families
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.errors import RecipeError

Planner = Callable[..., Plan]
INFEASIBLE = {"infeasible-budget", "nothing-smaller", "out-of-range"}
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "factors": ({"method": "svd"}, ("uniform", "lagrangian", "heavy-tail")),
    "pivoted": (
        {"method": "svd-llm", "storage": "pivoted_low_rank"},
        ("uniform", "lagrangian", "heavy-tail"),
    ),
    "biases": ({"method": "lord"}, ("uniform", "lagrangian")),
    "shared": ({"method": "basis-sharing", "layers_per_group": 2}, ("uniform", "lagrangian")),
    "sparse": ({"method": "sparse"}, ("uniform", "lagrangian")),
    "dictionary": ({"method": "dictionary"}, ("uniform", "lagrangian")),
    "joint": ({"method": "mixed", "schemes": ["int8", "int4-g16"]}, ("lagrangian",)),
}
OVERRIDES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "less": [{"match": "*.q_proj", "keep": 0.3}],
    "more": [{"match": "*.up_proj", "keep": 0.9}],
    "dense": [{"match": "*.up_proj", "keep": 1.0}],
    "all but one": [{"match": "layers.1.*", "keep": 0.4}, {"match": "*.q_proj", "keep": 0.7}],
    "nearly nothing": [{"match": "*.q_proj", "keep": 0.01}],
    "rank": [{"match": "*.up_proj", "rank": 9}],
    "every": [{"match": "*", "keep": 0.4}],
}
CASES = [
    (method, allocation, keep, multiple, override, ignore, measure)
    for method, (_, allocations) in METHODS.items()
    for allocation, keep, multiple, override, ignore, measure in product(
        allocations, (0.15, 0.5, 0.85), (1, 8), OVERRIDES, ([], ["*.k_proj"]), ("bits", "macs")
    )
    if not (override == "rank" and method in ("sparse", "dictionary", "joint"))
    and not (multiple > 1 and method in ("sparse", "dictionary"))
    and not (measure == "macs" and method == "joint")
]


def curves(
    tasks: Sequence[LayerTask], allocations: Sequence[Allocation], *_: Any, **__: Any
) -> dict[str, Curve]:
    """Make up errors that decrease with the size; every fifth task has no comparable ones."""
    found = {}
    for number, task in enumerate(tasks):
        assert task.allocation is not None
        allocation = allocations[task.allocation]
        low_rank = any("low_rank" in types for types in allocation.types)
        energies = torch.arange(min(task.stacked_shape), 0, -1, dtype=torch.float64)
        points = [
            Point(types, sizes, 100.0 / (1 + place))
            for types in allocation.types
            if "low_rank" not in types
            for _, family in size_families(task, types, allocation)
            for place, sizes in enumerate(reversed(family))
        ]
        found[task.name] = Curve(
            energies if low_rank else torch.zeros_like(energies),
            1,
            comparable=number % 5 != 4,
            points=points,
            total=1e4,
            quantization={str(args): 10.0 / args.bits for args in allocation.quantization},
        )
    return found


def planned(plan_of: Planner, stage: dict[str, Any]) -> Plan:
    plan = plan_of(stage)
    nothing: Any = None
    return allocate(plan, nothing, nothing, nothing, device="cpu", on_step=lambda *_: None)


@pytest.mark.parametrize("method", METHODS)
def test_the_total_is_met_from_below_and_overrides_are_respected(
    plan_of: Planner, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(module, "curves_for", curves)
    cases = [case for case in CASES if case[0] == method]
    feasible, refused = 0, set[str]()
    for case in Random(0).sample(cases, min(len(cases), 120)):
        _, allocation, keep, multiple, name, ignore, measure = case
        stage = {
            **METHODS[method][0],
            "allocation": allocation,
            "keep": keep,
            "rank_multiple": multiple,
            "overrides": OVERRIDES[name],
            "ignore": ignore,
            "measure": measure,
        }
        try:
            plan = planned(plan_of, stage)
        except RecipeError as error:
            refused |= {problem.code for problem in error.problems}
            continue
        feasible += 1
        check(plan, stage, case)
    assert feasible > 20
    assert refused <= INFEASIBLE


def check(plan: Plan, stage: dict[str, Any], case: Any) -> None:
    measure, multiple = measure_of(stage["measure"]), stage["rank_multiple"]
    costs = {task.name: task.cost(task.config, measure) for task in plan.tasks}
    dense = {task.name: task.dense_cost(measure) for task in plan.tasks}
    budget = stage["keep"] * sum(dense.values())
    assert not any(task.pending for task in plan.tasks)
    assert not any(fnmatchcase(name, pattern) for name in dense for pattern in stage["ignore"])
    assert sum(costs.values()) <= budget, case
    free = []
    for task in plan.tasks:
        override = next((o for o in stage["overrides"] if fnmatchcase(task.name, o["match"])), None)
        rank = task.config.sizes.get("rank")
        if override is None:
            free.append(task)
            assert rank is None or rank % multiple == 0, case
        elif not task.config.compressed:
            assert task.note, case
        elif "rank" in override:
            assert rank == override["rank"], case
        else:
            assert costs[task.name] <= override["keep"] * dense[task.name], case
    if stage["allocation"] != "uniform":
        return
    left = budget - sum(costs[task.name] for task in plan.tasks if task not in free)
    small = [task for task in free if not task.config.compressed]
    left -= sum(dense[task.name] for task in small)
    others = [task for task in free if task not in small]
    if not others:
        return
    fraction = left / sum(dense[task.name] for task in others)
    for task in others:  # the next size would be more than the common fraction
        sizes = SizeSteps(task, task.types, ratio=task.ratio)
        step = sizes.within(fraction, measure, multiple=multiple)
        assert sizes.config(step) == task.config, case
    for task in small:  # it did not fit when the fraction was at its largest
        sizes = SizeSteps(task, task.types, ratio=task.ratio)
        assert not sizes.within(fraction, measure, multiple=multiple) or fraction >= 1, case


@pytest.mark.parametrize("allocation", ["uniform", "lagrangian", "heavy-tail"])
def test_what_overrides_save_is_spent_on_the_others(
    plan_of: Planner, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    monkeypatch.setattr(module, "curves_for", curves)
    stage = {"method": "svd", "keep": 0.5, "allocation": allocation, "ignore": ["*tiny"]}
    plain = planned(plan_of, stage)
    saving = planned(plan_of, {**stage, "overrides": [{"match": "*.q_proj", "keep": 0.2}]})
    assert plain.kept == pytest.approx(0.5, abs=0.04)
    assert saving.kept == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("allocation", ["uniform", "lagrangian", "heavy-tail"])
def test_overrides_that_exceed_the_total_are_refused(plan_of: Planner, allocation: str) -> None:
    for match in ("*.up_proj", "*"):
        stage = {"method": "svd", "keep": 0.3, "allocation": allocation}
        with pytest.raises(RecipeError) as refused:
            plan_of({**stage, "overrides": [{"match": match, "keep": 0.9}]})
        (problem,) = refused.value.problems
        assert (problem.code, problem.where) == ("infeasible-budget", "stages[0].decompose.keep")
        assert "overrides" in problem.message


def test_a_stage_of_several_that_stays_dense_is_refused(plan_of: Planner) -> None:
    with pytest.raises(RecipeError) as refused:
        plan_of({"keep": 0.5, "targets": ["*proj"]}, {"keep": 0.5, "targets": ["*tiny"]})
    (problem,) = refused.value.problems
    assert (problem.code, problem.where) == ("nothing-smaller", "stages[1].decompose")
