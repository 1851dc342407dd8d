"""Pattern n:8 from a recipe to a checkpoint that is loaded, generates text and is saved again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.shared_runs import dense_with
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.cli.inspect import describe
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import WeightConfig
from lrc.compressors.layers.bitmask import unpack_bits
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import CheckpointError
from lrc.configs.load import load_recipe

WEIGHTS = "checkpoint/model.safetensors"
KIND = "semi_structured"
INT4 = {"quantize": {"method": "gptq", "bits": 4, "group_size": 8}}


def pruned(method: str, keep: float, **options: Any) -> dict[str, Any]:
    return {"decompose": {"method": method, "pattern": "n:8", "keep": keep, **options}}


STAGES: dict[str, list[dict[str, Any]]] = {
    "magnitude, uniform": [pruned("magnitude", 0.6)],
    "wanda, uniform": [pruned("wanda", 0.75)],
    "sparse, uniform, compensated": [
        pruned("sparse", 0.6, allocation="uniform", compensate={}),
    ],
    "sparse, by the lagrangian": [pruned("sparse", 0.6)],
    "sparse, to a size": [
        {"decompose": {"method": "sparse", "pattern": "n:8", "size": "92kB", "compensate": {}}}
    ],
    "sparse, int4": [pruned("sparse", 0.7), INT4],
    "mixed": [
        {
            "decompose": {
                "method": "mixed",
                "keep": 0.4,
                "components": [KIND, "pivoted_low_rank"],
                "schemes": ["int8", "int4-g8"],
                "compensate": {},
            }
        }
    ],
}
CASES = pytest.mark.parametrize("case", STAGES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe_for(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path]
) -> Callable[[list[dict[str, Any]], Path], Any]:
    def write(stages: list[dict[str, Any]], output: Path) -> Any:
        return load_recipe(tiny_recipe(tiny_model_folder, output, stages=stages))

    return write


@pytest.fixture(scope="module")
def compressed(recipe_for: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a case once; return its output folder."""
    done: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp("eights") / "run"
            compress(recipe_for(STAGES[case], done[case]), Machine(device="cpu"))
        return done[case]

    return run


def stored_as(plan: Plan) -> dict[str, WeightConfig]:
    """Return the weights of a plan that are stored with the pattern."""
    return {name: config for name, config in plan.modules().items() if KIND in config.types}


@CASES
def test_every_group_of_eight_inputs_has_n_values(
    case: str,
    compressed: Callable[..., Path],
    executed: Callable[[Path], Plan],
    weights_of: Callable[[Path], dict[str, Tensor]],
) -> None:
    run = compressed(case)
    stored, weights = load_file(run / WEIGHTS), weights_of(run)
    found = stored_as(executed(run))
    assert found
    for name, config in found.items():
        d_out, d_in = config.shape
        n = config.sizes["n"]
        packed = stored[f"{name}.{KIND}.mask"]
        assert packed.shape == (d_out, d_in // 8)
        mask = unpack_bits(packed, d_in)
        assert bool((mask.view(-1, 8).sum(dim=1) == n).all())
        assert not bool((weights[name] != 0)[~mask].any())
        if config.quantization is None:
            values = stored[f"{name}.{KIND}.values"]
            assert values.shape == (d_out, d_in // 8, n)
            assert torch.equal(values.flatten().float(), weights[name][mask])


@CASES
def test_stock_transformers_compute_the_stored_weights_and_generate(
    case: str,
    compressed: Callable[..., Path],
    weights_of: Callable[[Path], dict[str, Tensor]],
    tiny_model_folder: Path,
    sample: Tensor,
    tmp_path: Path,
) -> None:
    run = compressed(case)
    dense = dense_with(tiny_model_folder, weights_of(run))
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, logits = dense(sample).logits, model(sample).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        options = {"max_new_tokens": 4, "do_sample": False}
        text = model.generate(sample, **options)
        assert torch.equal(text, dense.generate(sample, **options))
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(again(sample).logits, logits)


@CASES
def test_budgets_are_kept_and_sizes_are_those_of_the_file(
    case: str, compressed: Callable[..., Path], executed: Callable[[Path], Plan]
) -> None:
    run = compressed(case)
    stage = STAGES[case][0]["decompose"]
    if "size" in stage:
        assert 0.93 * 92_000 < (run / WEIGHTS).stat().st_size <= 92_000
    targeted = json.loads((run / "report.json").read_text())["size"]["targeted"]
    if len(STAGES[case]) == 1 and "keep" in stage:
        assert stage["keep"] - 0.04 < targeted["kept"] <= stage["keep"]
    stored = load_file(run / WEIGHTS)
    for name, config in stored_as(executed(run)).items():
        own = [t for key, t in stored.items() if key.startswith(f"{name}.")]
        assert sum(t.numel() * t.element_size() * 8 for t in own) == config.stored_bits(16)


@pytest.mark.parametrize("case", ["sparse, by the lagrangian", "sparse, to a size"])
def test_the_allocation_chooses_n_for_every_matrix(
    case: str, compressed: Callable[..., Path], executed: Callable[[Path], Plan]
) -> None:
    found = stored_as(executed(compressed(case)))
    assert len({config.sizes["n"] for config in found.values()}) > 2


def test_uniform_mixes_two_neighbouring_sizes(
    compressed: Callable[..., Path], executed: Callable[[Path], Plan]
) -> None:
    for case, sizes in (("magnitude, uniform", {4, 5}), ("wanda, uniform", {5, 6})):
        found = stored_as(executed(compressed(case)))
        assert {config.sizes["n"] for config in found.values()} == sizes


@pytest.mark.parametrize("case", ["sparse, uniform, compensated", "sparse, by the lagrangian"])
def test_a_plan_given_back_gives_the_same_weights(
    case: str, compressed: Callable[..., Path], recipe_for: Any, tmp_path: Path
) -> None:
    first = compressed(case)
    stage = {**STAGES[case][0]["decompose"], "plan": str(first / "plan.json")}
    compress(recipe_for([{"decompose": stage}], tmp_path / "again"), Machine(device="cpu"))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


def test_plan_and_inspect_show_n(lrc: Callable[..., Any], compressed: Callable[..., Path]) -> None:
    run = compressed("wanda, uniform")
    planned = lrc("plan", run.with_name("run.yaml"), f"output={run.parent / 'planned'}")
    assert planned.code == 0
    inspected = lrc("inspect", run / "checkpoint")
    for printed in (planned.out, inspected.out):
        assert KIND in printed
        assert "5:8" in printed
        assert "6:8" in printed
    facts = describe(run / "checkpoint", verify=True)
    assert {c["n"] for module in facts["modules"] for c in module["components"]} == {5, 6}


@pytest.mark.parametrize(
    ("n", "words"),
    [(9, r"n must be in \[1, 8\]"), (0, "'n' must be a whole number >= 1"), (3, "values")],
)
def test_another_n_than_the_stored_one_is_refused(
    n: int, words: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    run = compressed("magnitude, uniform")
    config = json.loads((run / "checkpoint/config.json").read_text())
    next(iter(config["quantization_config"]["modules"].values()))["components"][0]["n"] = n
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((run / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("pattern", ["4:8", "9:8", "0:8", "n:4"])
def test_only_n_of_eight_itself_is_a_pattern_of_recipes(
    pattern: str, lrc: Callable[..., Any], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    stage = {"method": "sparse", "keep": 0.5, "pattern": pattern}
    ended = lrc("plan", tiny_recipe(tmp_path, tmp_path / "run", stages=[{"decompose": stage}]))
    ended.refuses(2)
    words = f"decompose.pattern: must be one of unstructured, 2:4, n:8, got '{pattern}'"
    assert words in " ".join(ended.err.split())
