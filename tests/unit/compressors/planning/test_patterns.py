"""Pattern 2:4: its sizes, what it costs, and which configurations and plans may have it."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from lrc.compressors.checkpoint.format import parse_modules
from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.layers import COMPONENTS, ComponentConfig, Sizes, WeightConfig
from lrc.compressors.methods.base import FixedSizeMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import ModelInfo, Plan
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.planning.user_plan import UserPlan, apply_user_plan
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.errors import CheckpointError

SHAPES = [(4, 4), (16, 24), (24, 16), (30, 44), (7, 12)]  # d_out, d_in
PRUNING = ["magnitude", "wanda", "sparse"]
DICTIONARIES = ["compot", "dictionary"]
OPTIONS = {"damp": 1e-6, "gradient_damp": 0.1, "pattern": "2:4"}
ROUNDS = {"compot": 20, "dictionary": 15}


def config_of(
    kind: str, shape: tuple[int, int], sizes: Sizes, pattern: str | None = "2:4"
) -> WeightConfig:
    return WeightConfig(shape, (ComponentConfig(kind, sizes, pattern=pattern),))


def task_of(kind: str, shape: tuple[int, int], config: WeightConfig | None = None) -> LayerTask:
    dense = WeightConfig(shape)
    return LayerTask((Weight("m", 0),), config or dense, 16, 0, kind, types=kind, pattern="2:4")


def steps_of(kind: str, shape: tuple[int, int]) -> SizeSteps:
    return SizeSteps(task_of(kind, shape), kind)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pruned_matrix_has_one_size(shape: tuple[int, int]) -> None:
    pruned = steps_of("sparse", shape)
    for step in (1, 5, pruned.largest):
        assert pruned.config(step).sizes == {"nonzeros": shape[0] * shape[1] // 2}
        assert pruned.config(step).components[0].pattern == "2:4"
    fraction = pruned.cost(1, BITS) / pruned.task.dense_cost(BITS)
    assert pruned.within(fraction, BITS) > 0
    assert pruned.within(fraction - 1e-6, BITS) == 0
    assert pruned.cheapest(BITS, multiple=1, min_keep=0) == pruned.cost(1, BITS)


def test_half_of_the_values_and_four_bits_per_group_are_stored() -> None:
    d_out, d_in = 576, 1536
    sentinel = 8
    bits = config_of("sparse", (d_out, d_in), {"nonzeros": d_out * d_in // 2}).stored_bits(16)
    assert bits == d_out * d_in // 4 * (2 * 16 + 4) + sentinel
    assert (bits - sentinel) / (16 * d_out * d_in) == 0.5625
    sizes = {"atoms": 256, "nonzeros": 128}
    dictionary = config_of("dictionary", (d_out, d_in), sizes, pattern=None).stored_bits(16)
    assert dictionary == 256 * d_in * 16 + 256 * d_out // 4 * (2 * 16 + 4) + sentinel


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dictionary_has_a_multiple_of_four_atoms_and_half_as_many_coefficients(
    shape: tuple[int, int],
) -> None:
    learnt = steps_of("dictionary", shape)
    configs = [learnt.config(step) for step in range(1, learnt.largest + 1)]
    sizes = [config.sizes for config in configs]
    assert sizes[0] == {"atoms": 4, "nonzeros": 2}
    assert sizes[-1]["atoms"] == min(shape) // 4 * 4  # as close to a complete basis as possible
    assert all(s["atoms"] % 4 == 0 and s["nonzeros"] == s["atoms"] // 2 for s in sizes)
    costs = [learnt.task.bits_of(config) for config in configs]
    assert costs == sorted(costs)
    assert len({s["atoms"] for s in sizes}) == min(shape) // 4  # every size that exists


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        (
            "sparse",
            (8, 6),
            r"pattern 2:4 needs a number of inputs divisible by 4, got a weight \[8, 6\]",
        ),
        ("dictionary", (3, 8), r"pattern 2:4 needs four atoms or more, got a weight \[3, 8\]"),
    ],
)
def test_a_shape_without_groups_of_four_is_rejected(
    kind: str, shape: tuple[int, int], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        steps_of(kind, shape).config(1)


def known(shape: tuple[int, int]) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    X, g = (
        torch.randn(300, side, generator=generator, dtype=torch.float64) for side in shape[::-1]
    )
    X = X * torch.linspace(0.2, 3, shape[1], dtype=torch.float64)
    return Statistics(300, inputs=Moment.of(X.T @ X), gradients=Moment.of(g.T @ g))


@pytest.mark.parametrize("name", PRUNING + DICTIONARIES)
def test_two_of_every_four_are_stored_and_the_curve_has_the_error_of_that(name: str) -> None:
    shape, method = (16, 24), METHODS[name]
    assert isinstance(method, FixedSizeMethod)
    kind = method.types[0]
    options = method.select(OPTIONS | {"rounds": ROUNDS.get(name)})
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = steps_of(kind, shape).config(6)
    found = method.solve(W, known(shape), config.sizes, **options)
    (parts,) = found.parts
    mask = parts["mask"] if kind == "sparse" else parts["mask"].T
    assert bool((mask.reshape(-1, 4).sum(dim=1) == 2).all())
    encoded = COMPONENTS[kind].encode(**parts)
    assert {f"{kind}.{leaf}": list(t.shape) for leaf, t in encoded.items()} == {
        name: spec.shape for name, spec in config.tensors().items()
    }
    errors, total = method.squared_errors(W, known(shape), [config.sizes], **options)
    assert found.relative_error == pytest.approx(found.squared_error / total, rel=1e-9)
    # The one size of a pruned matrix is solved completely; dictionaries take fewer rounds.
    assert errors[0] == pytest.approx(found.squared_error, rel=1e-9 if name in PRUNING else 0.2)


def test_a_plan_keeps_the_pattern_through_json() -> None:
    task = task_of("sparse", (8, 12), config_of("sparse", (8, 12), {"nonzeros": 48}))
    plan = Plan(ModelInfo("m", "bfloat16", "A", 96, 192, None, False), 0, {}, [task])
    (again,) = Plan.from_json(json.loads(json.dumps(plan.to_json()))).tasks
    assert again == task
    assert again.config.components[0].pattern == "2:4"
    assert task.kept_dense().config == WeightConfig((8, 12))


SPARSE = {"type": "sparse", "nonzeros": 48, "pattern": "2:4"}
DICTIONARY = {"type": "dictionary", "atoms": 8, "nonzeros": 4, "pattern": "2:4"}


def record_of(component: dict[str, Any]) -> dict[str, Any]:
    return {"shape": [8, 12], "components": [component]}


@pytest.mark.parametrize(
    ("component", "words"),
    [
        ({**SPARSE, "nonzeros": 47}, r"needs nonzeros 48 for \[8, 12\], got 47"),
        (
            {**DICTIONARY, "nonzeros": 3},
            r"needs atoms 8 and nonzeros 4 for \[8, 12\], got 8 and 3",
        ),
        ({**DICTIONARY, "atoms": 7}, r"needs atoms 8 and nonzeros 4 for \[8, 12\], got 7 and 4"),
    ],
)
def test_a_configuration_whose_sizes_rule_out_the_pattern_is_rejected(
    component: dict[str, Any], words: str
) -> None:
    with pytest.raises(
        CheckpointError, match=rf"modules\['layer'\]: pattern 2:4 {words}"
    ) as caught:
        parse_modules({"layer": record_of(component)}, "config.json")
    assert caught.value.code == "invalid-config"


def test_configurations_that_follow_the_pattern_are_accepted() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(12, 8), nn.Linear(12, 8)
    modules = parse_modules({"one": record_of(SPARSE), "two": record_of(DICTIONARY)}, "config.json")
    expected = replace_layers(model, modules)
    assert expected.keys() >= {"one.sparse.mask", "two.dictionary.mask"}


@pytest.mark.parametrize("pattern", ["1:4", 24, True, ["2:4"]])
def test_unknown_patterns_are_rejected(pattern: Any) -> None:
    with pytest.raises(ValueError, match="'pattern' of sparse must be 2:4, got"):
        WeightConfig.from_json(record_of({**SPARSE, "pattern": pattern}))


def test_low_rank_components_have_no_pattern() -> None:
    with pytest.raises(ValueError, match="'pattern' of low_rank must be left out, got"):
        WeightConfig.from_json(record_of({"type": "low_rank", "rank": 2, "pattern": "2:4"}))


def applied(kind: str, sizes: Sizes) -> tuple[LayerTask, Problems]:
    """Apply a user plan, which need not state the pattern."""
    problems = Problems()
    config = config_of(kind, (8, 12), sizes, pattern=None)
    plan = UserPlan("plan.json", "", {("m",): config}, [])
    (decided,) = apply_user_plan(plan, [task_of(kind, (8, 12))], METHODS[kind], problems)
    return decided, problems


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("sparse", {"nonzeros": 40}),
        ("dictionary", {"atoms": 6, "nonzeros": 3}),
        ("dictionary", {"atoms": 12, "nonzeros": 6}),
    ],
)
def test_a_user_plan_cannot_leave_the_pattern(kind: str, sizes: Sizes) -> None:
    decided, problems = applied(kind, sizes)
    assert [(p.code, p.where) for p in problems] == [("size-out-of-range", "plan.json: m")]
    assert not decided.config.compressed


def test_a_user_plan_that_follows_the_pattern_keeps_it() -> None:
    decided, problems = applied("sparse", {"nonzeros": 48})
    assert problems == []
    assert decided.config == config_of("sparse", (8, 12), {"nonzeros": 48})
