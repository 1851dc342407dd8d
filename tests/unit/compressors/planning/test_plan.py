"""Plans have one serialization, which is exact."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerResult
from lrc.compressors.prepare import prepare
from lrc.compressors.stages import STAGES
from lrc.configs.recipe import Recipe

RECIPES: dict[str, list[dict[str, Any]]] = {
    "ranks": [{"decompose": {"method": "svd", "keep": 0.5}}],
    "biases": [{"decompose": {"method": "lord", "keep": 0.5}}],
    "pending": [{"decompose": {"method": "kfac", "keep": 0.6}}],
    "pending within a size": [{"decompose": {"method": "sparse", "size": "90kB"}}],
    "several ratios": [{"decompose": {"method": "dictionary", "keep": 0.6, "ratio": [1.5, 3]}}],
    "heavy tail": [{"decompose": {"method": "svd", "keep": 0.5, "allocation": "heavy-tail"}}],
    "a pattern": [{"decompose": {"method": "wanda", "keep": 0.6, "pattern": "2:4"}}],
    "shared factors": [{"decompose": {"method": "basis-sharing", "keep": 0.5}}],
    "a shared dictionary": [
        {"decompose": {"method": "cospadi", "keep": 0.7, "layers_per_group": 2}}
    ],
    "compensation": [{"decompose": {"method": "svd-llm", "keep": 0.5, "compensate": {}}}],
    "overrides": [
        {
            "decompose": {
                "method": "svd",
                "keep": 0.5,
                "overrides": [{"match": "*.q_proj", "rank": 2}, {"match": "*.k_proj", "keep": 1}],
            }
        }
    ],
    "choices of integers": [
        {
            "decompose": {
                "method": "mixed",
                "keep": 0.4,
                "schemes": ["int8", "int4-g16-asymmetric"],
                "embeddings": "int8",
            }
        }
    ],
    "integers": [{"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}],
    "integers with correction": [
        {"quantize": {"method": "gptq", "bits": 3, "low_rank_correction": {"rank": 2}}}
    ],
    "groups removed": [{"quantize": {"method": "gqsa", "bits": 4, "group_size": 16}}],
    "integers of embeddings only": [
        {"quantize": {"method": "rtn", "bits": 8, "targets": [], "embeddings": "int4-g16"}}
    ],
    "decomposed and quantized": [
        {"decompose": {"method": "svd-llm", "keep": 0.5, "targets": ["*mlp*"]}},
        {"quantize": {"method": "gptq", "bits": 8, "embeddings": "int8", "lm_head": "int4-g16"}},
    ],
    "pending and quantized": [
        {"decompose": {"method": "kfac", "keep": 0.6}},
        {"quantize": {"method": "rtn", "bits": 8}},
    ],
    "sliced": [{"slice": {"method": "slicegpt", "keep": 0.7}}],
    "sliced and decomposed": [
        {"slice": {"method": "drop", "keep": 0.9}},
        {"decompose": {"method": "svd", "keep": 0.5}},
    ],
}


@pytest.fixture
def compiled(tiny_model_folder: Path, tiny_text: Path) -> Callable[[str], Plan]:
    def compile_(case: str) -> Plan:
        recipe = Recipe.model_validate(
            {
                "model": {"path": str(tiny_model_folder), "dtype": "bfloat16"},
                "calibration": {"source": str(tiny_text), "samples": 4, "length": 64},
                "stages": RECIPES[case],
                "output": "o",
                "seed": 7,
            }
        )
        return prepare(recipe, STAGES).plan

    return compile_


def read_back(plan: Plan) -> Plan:
    """Write a plan as text and read it."""
    return Plan.from_json(json.loads(json.dumps(plan.to_json())))


def assert_same(plan: Plan) -> None:
    again = read_back(plan)
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert json.dumps(again.to_json()) == json.dumps(plan.to_json())  # the order of keys too
    assert again.modules() == plan.modules()
    assert again.owner_layers() == plan.owner_layers()


@pytest.mark.parametrize("case", RECIPES)
def test_reading_what_was_written_gives_the_same_plan(
    case: str, compiled: Callable[[str], Plan]
) -> None:
    plan = compiled(case)
    assert plan.seed == 7
    assert bool(plan.allocations) == any(task.pending for task in plan.tasks)
    assert bool(plan.slices) == case.startswith("sliced")
    assert_same(plan)


@pytest.mark.parametrize("case", RECIPES)
def test_results_are_part_of_the_plan(case: str, compiled: Callable[[str], Plan]) -> None:
    plan = compiled(case)
    decided = [replace(t, allocation=None, estimated_bits=None) for t in plan.all_tasks]
    results = {
        task.name: LayerResult(task.config, 0.1 / 3, 1e-300, refit=True, fallback="a note")
        for task in decided
    }
    done = plan.with_tasks(decided).with_results(results)
    assert (done.results == plan.results) == (not decided)
    assert_same(done)


def test_a_changed_result_changes_totals(compiled: Callable[[str], Plan]) -> None:
    plan = compiled("ranks")
    task = next(task for task in plan.tasks if task.compressed)
    done = plan.with_results({task.name: LayerResult(task.kept_dense().config, fallback="dense")})
    assert done.bits - plan.bits == task.dense_bits - task.bits
    assert done.compressed_bytes > plan.compressed_bytes
    assert plan.modules().keys() - done.modules().keys() == {task.name}


def test_the_totals_in_json_are_those_of_the_plan(compiled: Callable[[str], Plan]) -> None:
    plan = compiled("ranks")
    values = json.loads(json.dumps(plan.to_json()))
    assert values["totals"]["kept"] == plan.kept
    assert values["totals"]["compressed_bytes"] == plan.compressed_bytes
    first = values["tasks"][0]
    assert first["config"]["shape"] == [32, 32]
    assert first["weights"] == [{"name": "model.layers.0.self_attn.q_proj", "layer": 0}]
    ranked = {task.name for task in plan.tasks if "rank" in task.config.sizes}
    assert set(plan.modules()) == ranked


def test_quantization_args_are_written_as_in_recipes(compiled: Callable[[str], Plan]) -> None:
    plan = compiled("choices of integers")
    values = plan.to_json()
    assert values["allocations"][0]["quantization"] == ["int8", "int4-g16-asymmetric"]
    assert values["embeddings"][0]["quantize"]["args"] == "int8"
    assert compiled("integers").to_json()["tasks"][0]["config"]["components"] == [
        {"type": "dense", "quantization": "int4-g16"}
    ]


def without(values: Mapping[str, Any], *path: Any, **changes: Any) -> Any:
    """Return a deep copy of JSON values with changes at a path."""
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in path:
        inner = inner[key]
    inner.update(changes)
    return copy


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ((), {"version": 1}),
        ((), {"tasks": 3}),
        (("tasks", 0), {"weights": 3}),
        (("tasks", 0), {"config": {"shape": [32, 32]}}),
        (("tasks", 0), {"config": {"shape": [32, 32], "components": [{"type": "wavelet"}]}}),
        (("tasks", 0, "quantize"), {"args": "int99"}),
    ],
)
def test_values_that_are_no_plan_are_rejected(
    path: tuple[Any, ...], changes: dict[str, Any], compiled: Callable[[str], Plan]
) -> None:
    values = compiled("integers").to_json()
    assert Plan.from_json(without(values, *path)) == compiled("integers")
    with pytest.raises(ValueError, match="validation error"):
        Plan.from_json(without(values, *path, **changes))
