"""Tensor trains from a recipe to a model that generates, and what is refused before the work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.shared_runs import Run, dense_with
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import RecipeError
from lrc.configs.load import load_recipe

BASE = {"method": "tensor-train", "keep": 0.6, "rounds": 2}
STAGES: dict[str, dict[str, Any]] = {
    "by the lagrangian": BASE,
    "uniform": {**BASE, "allocation": "uniform"},
    "four cores": {**BASE, "cores": 4, "allocation": "uniform"},
    "given factors": {**BASE, "factors": [[2, 16], [6, 8]], "allocation": "uniform"},
    "compensated": {**BASE, "compensate": {}},
    "a size": {**BASE, "size": "90kB", "keep": None},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=STAGES)
def case(request: pytest.FixtureRequest, run_stages: Run) -> tuple[dict[str, Any], Any, Path]:
    stage = STAGES[request.param]
    return stage, *run_stages({"decompose": stage}, device="cpu")


def test_counted_bits_are_stored_and_stock_transformers_compute_the_cores(
    case: tuple[dict[str, Any], Any, Path],
    executed: Callable[[Path], Plan],
    weights_of: Callable[[Path], dict[str, Tensor]],
    tiny_model_folder: Path,
    sample: Tensor,
) -> None:
    stage, report, run = case
    tensors = load_file(run / "checkpoint/model.safetensors")
    plan = executed(run)
    assert plan.modules()
    for name, config in plan.modules().items():
        (component,) = config.components
        assert component.type == "tensor_train"
        sides = [[*map(int, s.split("x"))] for s in str(component.pattern).split(",")]
        assert {len(side) for side in sides} == {stage.get("cores", 2)}
        for d, side in zip(config.shape, sides, strict=True):
            assert side in stage.get("factors", [side]) or d not in (32, 48)
        own = [t for key, t in tensors.items() if key.startswith(f"{name}.")]
        assert sum(t.numel() * t.element_size() for t in own) * 8 == config.stored_bits(16)
    kept = report["size"]["targeted"]["kept"]
    assert kept <= stage["keep"] if stage["keep"] else "size" in stage
    assert not any(layer["fallback"] for layer in report["layers"])

    dense = dense_with(tiny_model_folder, weights_of(run))
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, logits = dense(sample).logits, model(sample).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        written = [
            each.generate(sample[:1, :5], max_new_tokens=4, do_sample=False)
            for each in (dense, model)
        ]
    assert torch.equal(*written)


def problems(stage: dict[str, Any], folder: Path, recipe: Callable[..., Path], to: Path) -> str:
    path = recipe(folder, to, stages=[{"decompose": stage}])
    with pytest.raises(RecipeError) as caught:
        compress(load_recipe(path), Machine("cpu"))
    return "\n".join(f"[{p.code}] {p.where}: {p.message}" for p in caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cores": 5}, "cores: must be a whole number >= 2 and <= 4, got 5; lower it"),
        ({"factors": [[2, 4, 4]]}, "'factors' must list 2 factors for every dimension"),
        ({"factors": [[4, 8], [8, 4]]}, "must list every dimension once, got 32 twice"),
        (
            {"factors": [[4, 9]]},
            "[no-match] stages[0].decompose.factors[0]: must multiply to a dimension of a targeted "
            "matrix (16, 32, 48), got [4, 9] with product 36; correct or remove it",
        ),
        (
            {"factors": [[1, 32], [1, 16], [1, 48]]},
            "[pattern-mismatch] stages[0].decompose.cores: model.layers.0.self_attn.q_proj: "
            "[32, 32] cannot be factored into 2 cores: with the factors 1x32 and 1x32, core 1 has "
            "one output and one input; list the layer under 'ignore' or lower cores",
        ),
        (
            {"overrides": [{"match": "*.q_proj", "rank": 3}]},
            "tensor-train has no ranks; give 'keep'",
        ),
        ({"elastic": [0.8, 0.6], "keep": None}, "'elastic' cannot be combined with method"),
    ],
)
def test_what_cannot_be_factored_is_refused(
    changes: dict[str, Any],
    words: str,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    assert words in problems({**BASE, **changes}, tiny_model_folder, tiny_recipe, tmp_path / "run")


@pytest.mark.parametrize("bond", [0, 33, 30])
def test_bond_dimensions_out_of_range_are_refused(
    bond: int,
    run_stages: Run,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    _, run = run_stages({"decompose": STAGES["uniform"]}, device="cpu")
    plan = json.loads((run / "plan.json").read_text())
    (task,) = (t for t in plan["tasks"] if t["weights"][0]["name"].endswith("0.self_attn.q_proj"))
    task["config"]["components"][0]["bond"] = bond
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    stage = {**BASE, "plan": str(tmp_path / "plan.json"), "keep": None}
    words = {
        0: "'bond' must be a whole number >= 1, got 0",
        33: "bond must be in [1, 32] for [32, 32] with the factors 4x8 and 8x4, got 33; correct it",
        30: "with bond 30 takes as much as the dense weight; lower bond to at most",
    }[bond]
    assert words in problems(stage, tiny_model_folder, tiny_recipe, tmp_path / "run")
