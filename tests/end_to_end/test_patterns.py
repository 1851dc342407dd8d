"""Pattern 2:4 from a recipe to a checkpoint: what is written keeps the pattern."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.cli.inspect import describe
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import WeightConfig
from lrc.compressors.layers.bitmask import unpack_bits
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import CheckpointError, Stopped
from lrc.configs.load import load_recipe

WEIGHTS = "checkpoint/model.safetensors"
STAGES: dict[str, dict[str, Any]] = {
    "magnitude, uniform": {"method": "magnitude", "keep": 0.6},
    "wanda, by the lagrangian": {"method": "wanda", "keep": 0.8, "allocation": "lagrangian"},
    "sparse, compensated": {"method": "sparse", "keep": 0.8, "compensate": {}},
    "sparse, to a size": {"method": "sparse", "size": "92kB"},
    "compot, uniform": {"method": "compot", "keep": 0.6, "allocation": "uniform", "rounds": 3},
    "dictionary, compensated": {
        "method": "dictionary",
        "keep": 0.6,
        "rounds": 3,
        "compensate": {},
    },
}
STAGES = {case: {**stage, "pattern": "2:4"} for case, stage in STAGES.items()}
CASES = pytest.mark.parametrize("case", STAGES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe_for(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path]
) -> Callable[[dict[str, Any], Path], Any]:
    def write(stage: dict[str, Any], output: Path) -> Any:
        return load_recipe(tiny_recipe(tiny_model_folder, output, stages=[{"decompose": stage}]))

    return write


@pytest.fixture(scope="module")
def compressed(recipe_for: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a case once; return its output folder."""
    done: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp("patterns") / "run"
            compress(recipe_for(STAGES[case], done[case]), Machine(device="cpu"))
        return done[case]

    return run


def modules_of(run: Path) -> dict[str, dict[str, Any]]:
    config = json.loads((run / "checkpoint/config.json").read_text())
    modules: dict[str, dict[str, Any]] = config["quantization_config"]["modules"]
    return modules


def nonzeros_of_fours(rows: Tensor) -> Tensor:
    """Count the entries that differ from zero in every four of a row."""
    return (rows.reshape(-1, 4) != 0).sum(dim=1)


@CASES
def test_of_every_four_at_most_two_differ_from_zero(
    case: str,
    compressed: Callable[..., Path],
    executed: Callable[[Path], Plan],
    weights_of: Callable[[Path], dict[str, Tensor]],
) -> None:
    run = compressed(case)
    stored, modules, weights = load_file(run / WEIGHTS), modules_of(run), weights_of(run)
    assert modules
    plan = executed(run)
    assert modules == {name: config.to_json() for name, config in plan.modules().items()}
    for name, config in plan.modules().items():
        (component,) = config.components
        assert component.pattern == "2:4"
        width = config.sizes.get("atoms", config.shape[1])
        mask = unpack_bits(stored[f"{name}.{component.type}.mask"], width)
        assert bool((nonzeros_of_fours(mask) == 2).all())
        if component.type == "sparse":
            assert int(nonzeros_of_fours(weights[name]).max()) == 2


@CASES
def test_stock_transformers_compute_the_stored_weights(
    case: str,
    compressed: Callable[..., Path],
    weights_of: Callable[[Path], dict[str, Tensor]],
    tiny_model_folder: Path,
    sample: Tensor,
) -> None:
    run = compressed(case)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(parameter.bfloat16())
        for name, weight in weights_of(run).items():
            dense.get_submodule(name).weight.copy_(weight)
        expected = dense(sample).logits
        model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
        logits = model.eval()(sample).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@CASES
def test_budgets_are_kept(case: str, compressed: Callable[..., Path]) -> None:
    stage, run = STAGES[case], compressed(case)
    if "size" in stage:
        assert 0.95 * 92_000 < (run / WEIGHTS).stat().st_size <= 92_000
    else:
        targeted = json.loads((run / "report.json").read_text())["size"]["targeted"]
        assert stage["keep"] - 0.15 < targeted["kept"] <= stage["keep"]


@pytest.mark.parametrize(
    "case", ["wanda, by the lagrangian", "sparse, compensated", "sparse, to a size"]
)
def test_the_lagrangian_chooses_between_dense_and_the_one_size(
    case: str, compressed: Callable[..., Path], executed: Callable[[Path], Plan]
) -> None:
    plan = executed(compressed(case))
    configs = [plan.stored_config(task) for task in plan.tasks]
    assert {config.types for config in configs} == {"dense", "sparse"}
    sparse = [config for config in configs if config.compressed]
    assert all(2 * c.sizes["nonzeros"] == c.shape[0] * c.shape[1] for c in sparse)


@pytest.mark.parametrize("case", ["sparse, compensated", "dictionary, compensated"])
def test_a_plan_given_back_gives_the_same_weights(
    case: str, compressed: Callable[..., Path], recipe_for: Any, tmp_path: Path
) -> None:
    first = compressed(case)
    stage = {**STAGES[case], "plan": str(first / "plan.json")}
    compress(recipe_for(stage, tmp_path / "again"), Machine(device="cpu"))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    assert modules_of(tmp_path / "again") == modules_of(first)


@pytest.mark.parametrize("stage", ["allocate", "compress"])
def test_a_stopped_run_continues_to_the_same_bytes(
    stage: str, compressed: Callable[..., Path], recipe_for: Any, tmp_path: Path
) -> None:
    recipe = recipe_for(STAGES["sparse, compensated"], tmp_path / "run")

    def stop(at: str, done: int, total: int) -> None:
        if (at, done) == (stage, 1):
            raise Stopped("requested")

    with pytest.raises(Stopped):
        compress(recipe, Machine(device="cpu", on_step=stop))
    compress(recipe, Machine(device="cpu"))
    whole = compressed("sparse, compensated")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_plan_and_inspect_show_the_pattern(
    lrc: Callable[..., Any], compressed: Callable[..., Path]
) -> None:
    run = compressed("sparse, compensated")
    recipe = run.with_name("run.yaml")
    planned = lrc("plan", recipe, f"output={run.parent / 'planned'}")
    assert planned.code == 0
    assert planned.out.count("sparse 2:4") == 7  # rows
    inspected = lrc("inspect", run / "checkpoint")
    lines = [line for line in inspected.out.splitlines() if "sparse 2:4" in line]
    rows = [line for line in lines if "such as" not in line]  # of a form without a fast path
    assert len(rows) == len(modules_of(run))
    facts = describe(run / "checkpoint", verify=True)
    assert {c["pattern"] for m in facts["modules"] for c in m["components"]} == {"2:4"}


def test_a_pattern_that_contradicts_the_sizes_is_refused(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    run = compressed("compot, uniform")
    config = json.loads((run / "checkpoint/config.json").read_text())
    record = next(iter(config["quantization_config"]["modules"].values()))
    sizes = WeightConfig.from_json(record).sizes
    record["components"][0]["nonzeros"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((run / WEIGHTS).read_bytes())
    words = f"pattern 2:4 needs atoms {sizes['atoms']} and nonzeros {sizes['nonzeros']}"
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        describe(tmp_path, verify=False)
