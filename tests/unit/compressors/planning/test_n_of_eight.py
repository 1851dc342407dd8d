"""Pattern n:8: its sizes, how both allocations choose n, and what is rejected."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lrc.compressors.layers import COMPONENTS, ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.methods.base import FixedSizeMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning import allocate as module
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.candidates import candidates_for
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import Allocation, Plan
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.rate_distortion import Curve, Point, size_families
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.planning.user_plan import UserPlan, apply_user_plan
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.errors import RecipeError

Planner = Callable[..., Plan]
KIND = "semi_structured"
STAGE = {"method": "sparse", "pattern": "n:8", "ignore": ["*tiny"]}
SENTINEL = 8


def config_of(shape: tuple[int, int], n: int, scheme: str | None = None) -> WeightConfig:
    args = None if scheme is None else QuantizationArgs.parse(scheme)
    return WeightConfig(shape, (ComponentConfig(KIND, {"n": n}, args),))


def steps_of(shape: tuple[int, int], bits: int = 16) -> SizeSteps:
    task = LayerTask((Weight("m", 0),), WeightConfig(shape), bits, 0, "sparse", types=KIND)
    return SizeSteps(task, KIND)


def n_of(task: LayerTask) -> int:
    return task.config.sizes["n"]


@pytest.mark.parametrize("n", range(1, 9))
def test_a_group_takes_n_numbers_and_a_byte(n: int) -> None:
    d_out, d_in = 576, 1536
    config = config_of((d_out, d_in), n)
    assert config.stored_bits(16) == d_out * d_in // 8 * (16 * n + 8) + SENTINEL
    assert config.parameters() == n * d_out * d_in // 8
    assert config.description == f"{n}:8"
    # Quantized like the values of an unstructured mask: one row of codes, groups across rows.
    values = n * d_out * d_in // 8
    packed = 4 * values + 16 * (values // 64) + d_out * d_in + SENTINEL
    assert config_of((d_out, d_in), n, "int4-g64").stored_bits(16) == packed
    assert WeightConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("n", range(1, 9))
def test_it_takes_as_many_bits_as_a_mask_of_the_same_entries(n: int) -> None:
    sparse = ComponentConfig("sparse", {"nonzeros": n * 24 * 6})
    same = WeightConfig((24, 48), (sparse,))
    assert config_of((24, 48), n).stored_bits(16) == same.stored_bits(16)


@pytest.mark.parametrize("bits", [16, 32])
def test_steps_are_n_and_a_fraction_gives_the_largest_that_fits(bits: int) -> None:
    steps = steps_of((16, 24), bits)
    assert steps.largest == 8
    assert [steps.config(n).sizes for n in range(1, 9)] == [{"n": n} for n in range(1, 9)]
    dense = steps.task.dense_cost(BITS)
    costs = [steps.cost(n, BITS) for n in range(1, 8)]
    assert costs == sorted(costs)
    for n, cost in enumerate(costs, start=1):
        assert steps.within(cost / dense, BITS) == n
        assert steps.within((cost - 1) / dense, BITS) == n - 1
    assert steps.within(1, BITS) == 7  # all eight, with a mask, take more than the dense weight
    assert steps.cheapest(BITS, multiple=1, min_keep=0.0) == costs[0]


@pytest.mark.parametrize("d_in", [1, 4, 12, 43])
def test_a_width_that_is_no_multiple_of_eight_has_no_size(d_in: int) -> None:
    steps = steps_of((16, d_in))
    assert steps.largest == steps.within(1, BITS) == 0
    words = rf"^pattern n:8 needs a number of inputs divisible by 8, got a weight \[16, {d_in}\]$"
    with pytest.raises(ValueError, match=words):
        steps.config(4).tensors()
    record = {"shape": [16, d_in], "components": [{"type": KIND, "n": 4}]}
    with pytest.raises(ValueError, match=words):
        WeightConfig.from_json(record)


@pytest.mark.parametrize("keep", [0.19, 0.3, 0.4375, 0.5, 0.5626, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("layers", [3, 12])
def test_uniform_meets_keep_with_two_neighbouring_sizes_spread_over_the_layers(
    plan_of: Planner, keep: float, layers: int
) -> None:
    plan = plan_of({**STAGE, "keep": keep, "allocation": "uniform"}, layers=layers)
    dense = sum(task.dense_bits for task in plan.tasks)
    largest = max(task.dense_bits for task in plan.tasks) / 8
    bits = sum(task.bits for task in plan.tasks)
    assert keep * dense - largest < bits <= keep * dense
    lower = {task.name: SizeSteps(task, KIND).within(keep, BITS) for task in plan.tasks}
    raised: dict[tuple[int, int], list[int]] = {}  # every kind of matrix has another shape
    for task in plan.tasks:
        assert n_of(task) - lower[task.name] in (0, 1)
        raised.setdefault(task.shape, []).append(n_of(task) - lower[task.name])
    for shape, found in raised.items():
        assert len(found) == layers
        steps = steps_of(shape)
        cost, larger = (steps.cost(steps.within(keep, BITS) + i, BITS) for i in (0, 1))
        share = (keep * steps.task.dense_bits - cost) / (larger - cost)
        # Also in every part of the model, up to what is carried over from other kinds of matrices.
        for part in (found[: layers // 2], found[layers // 2 :], found):
            assert abs(sum(part) - share * len(part)) <= 2


@pytest.mark.parametrize("keep", [0.94, 0.97, 0.999])
def test_uniform_never_stores_more_than_seven_of_eight(plan_of: Planner, keep: float) -> None:
    plan = plan_of({**STAGE, "keep": keep, "allocation": "uniform"})
    assert {n_of(task) for task in plan.tasks} == {7}


def test_overrides_are_met_from_below_and_the_others_share_the_rest(plan_of: Planner) -> None:
    overrides = [{"match": "*.up_proj", "keep": 0.5}]
    stage = {**STAGE, "keep": 0.6, "allocation": "uniform", "overrides": overrides}
    plan = plan_of(stage, layers=8)
    up = [task for task in plan.tasks if task.name.endswith("up_proj")]
    assert {n_of(task) for task in up} == {3}
    dense = sum(task.dense_bits for task in plan.tasks)
    assert 0.58 * dense < sum(task.bits for task in plan.tasks) <= 0.6 * dense
    assert {n_of(task) for task in plan.tasks if task not in up} >= {6}


def curves(
    tasks: list[LayerTask], allocations: list[Allocation], *_: Any, **__: Any
) -> dict[str, Curve]:
    """Make up errors that decrease with n, tenfold for every other layer."""
    found = {}
    for task in tasks:
        assert task.allocation is not None
        scale = 10.0 if task.layer % 2 else 1.0
        points = [
            Point(types, sizes, scale * task.dense_bits * 0.25 ** sizes["n"])
            for types in allocations[task.allocation].types
            if types == KIND
            for _, family in size_families(task, types, allocations[task.allocation])
            for sizes in family
        ]
        energies = torch.logspace(6, 5, min(task.shape), dtype=torch.float64)
        found[task.name] = Curve(energies, 1, points=points, total=1e9)
    return found


def allocated(plan: Plan) -> Plan:
    nothing: Any = None
    return allocate(plan, nothing, nothing, nothing, device="cpu", on_step=lambda *_: None)


def test_the_lagrangian_chooses_n_for_every_matrix(
    plan_of: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "curves_for", curves)
    pending = plan_of({**STAGE, "keep": 0.6}, layers=6)
    assert all(task.pending for task in pending.tasks)
    for task in pending.tasks:
        (allocation,) = pending.allocations
        curve = curves([task], [allocation])[task.name]
        offered = candidates_for(task, curve, allocation)
        assert [c.config.sizes for c in offered] == [*({"n": n} for n in range(1, 8)), {}]
    plan = allocated(pending)
    assert plan.kept <= 0.6
    important, others = (
        [task for task in plan.tasks if task.layer % 2 == odd and task.config.compressed]
        for odd in (1, 0)
    )
    assert min(map(n_of, important)) > min(map(n_of, others))
    assert len(Counter(map(n_of, [*important, *others]))) > 1


def test_mixed_plans_leave_other_widths_to_other_types(
    plan_of: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "curves_for", curves)
    for components in ([KIND, "pivoted_low_rank"], ["pivoted_low_rank", KIND], [KIND]):
        stage = {"method": "mixed", "components": components, "keep": 0.7}
        plan = allocated(plan_of(stage, other={"layers.0.mlp.up_proj": (96, 43)}))
        types = {task.name: task.config.types for task in plan.tasks}
        assert types["layers.1.mlp.up_proj"] == KIND
        assert types["layers.0.mlp.up_proj"] in ("dense", "pivoted_low_rank")
        assert types["layers.0.tiny"] != KIND
        assert plan.kept <= 0.7


REJECTED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]], str, str, list[str]]] = {
    "a width that is no multiple of eight": (
        {"keep": 0.6},
        {"layers.0.attn.k_proj": (16, 12)},
        "pattern-mismatch",
        "stages[0].decompose.pattern",
        ["layers.0.attn.k_proj", "divisible by 8", "[16, 12]", "pattern: unstructured"],
    ),
    "the same, uniform": (
        {"keep": 0.6, "allocation": "uniform"},
        {"layers.1.mlp.up_proj": (96, 60)},
        "pattern-mismatch",
        "stages[0].decompose.pattern",
        ["layers.1.mlp.up_proj", "divisible by 8", "[96, 60]"],
    ),
    "less than one of eight": (
        {"keep": 0.1, "allocation": "uniform"},
        {},
        "nothing-smaller",
        "stages",
        ["every targeted matrix stays dense", "raise 'keep'"],
    ),
    "less than one of eight, by the lagrangian": (
        {"keep": 0.1},
        {},
        "infeasible-budget",
        "stages[0].decompose.keep",
        ["must be at least 0.18", "got 0.1"],
    ),
    "a floor between two sizes": (
        {"keep": 0.6, "min_keep": 0.58, "allocation": "uniform"},
        {},
        "infeasible-budget",
        "stages[0].decompose.min_keep",
        ["[64, 64] has no n of n:8 that keeps between 0.58 and 0.6; lower min_keep"],
    ),
    "a rank": (
        {"keep": 0.6, "overrides": [{"match": "*.q_proj", "rank": 5}]},
        {},
        "contradiction",
        "stages[0].decompose.overrides[0].rank",
        ["sparse has no ranks"],
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_budgets_and_shapes_without_a_size_are_rejected(plan_of: Planner, case: str) -> None:
    changes, other, code, where, parts = REJECTED[case]
    with pytest.raises(RecipeError) as caught:
        plan_of({**STAGE, **changes}, other=other)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == (code, where)
    for part in parts:
        assert part in problem.message


def applied(component: ComponentConfig, method: str = "sparse") -> tuple[LayerTask, Problems]:
    task = LayerTask((Weight("m", 0),), WeightConfig((8, 16)), 16, 0, method, types=KIND)
    problems = Problems()
    plan = UserPlan("plan.json", "", {("m",): WeightConfig((8, 16), (component,))}, {})
    (decided,) = apply_user_plan(plan, [task], METHODS[method], problems)
    return decided, problems


def test_a_user_plan_may_change_n() -> None:
    decided, problems = applied(ComponentConfig(KIND, {"n": 3}))
    assert problems == []
    assert decided.config == config_of((8, 16), 3)
    decided, problems = applied(ComponentConfig(KIND, {"n": 3}), "mixed")
    assert problems == []


@pytest.mark.parametrize(
    ("component", "code", "words"),
    [
        (ComponentConfig(KIND, {"n": 9}), "size-out-of-range", r"n must be in [1, 8] for [8, 16]"),
        (ComponentConfig(KIND, {"n": 8}), "size-out-of-range", "lower n to at most 7"),
        (
            ComponentConfig("sparse", {"nonzeros": 50}),
            "wrong-component",
            "must be of type semi_structured here, got sparse",
        ),
    ],
)
def test_a_user_plan_cannot_leave_the_pattern(
    component: ComponentConfig, code: str, words: str
) -> None:
    decided, problems = applied(component)
    assert [(p.code, p.where) for p in problems] == [(code, "plan.json: m")]
    assert words in problems[0].message
    assert not decided.config.compressed


def known(shape: tuple[int, int]) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    X, g = (
        torch.randn(300, side, generator=generator, dtype=torch.float64) for side in shape[::-1]
    )
    return Statistics(300, inputs=Moment.of(X.T @ X), gradients=Moment.of(g.T @ g))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparse"])
def test_solutions_have_the_declared_tensors(name: str) -> None:
    shape, method = (16, 24), METHODS[name]
    assert isinstance(method, FixedSizeMethod)
    options = method.select({"damp": 1e-6, "gradient_damp": 0.1, "pattern": "n:8"})
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in range(1, 9):
        config = replace(steps_of(shape).config(n))
        (parts,) = method.solve(W, known(shape), config.sizes, **options).parts
        assert bool((parts["mask"].view(-1, 8).sum(dim=1) == n).all())
        encoded = COMPONENTS[KIND].encode(**parts)
        assert {f"{KIND}.{leaf}": list(t.shape) for leaf, t in encoded.items()} == {
            leaf: spec.shape for leaf, spec in config.tensors().items()
        }
        rows = encoded["values"].flatten(1)
        assert torch.equal(rows, parts["W_hat"][parts["mask"]].view(16, -1))
