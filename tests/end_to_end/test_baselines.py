"""Baselines of a result: measured in the same run, reported, and compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.evaluate.baseline_comparison import compare_with_baselines
from lrc.compressors.evaluate.baselines import measure, plan_baseline
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.prepare import prepare
from lrc.compressors.report import baseline_targets
from lrc.compressors.stages import STAGES
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

SOME = "evaluate.baselines=[int8, int4-g16, sparse]"
ORDER = ["int8", "int4-g16", "sparse, magnitude"]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(recipe: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return compress(load_recipe(recipe, overrides), Machine("cpu", **options))


def test_the_command_shows_size_against_perplexity_and_which_wins(
    lrc: Callable[..., Any], recipe: Path, output: Path, tiny_model_folder: Path
) -> None:
    ended = lrc("compress", recipe, SOME)
    assert ended.code == 0, ended.err
    report = json.loads((output / "report.json").read_text())
    evaluation = report["evaluation"]
    assert [each["name"] for each in evaluation["baselines"]] == ORDER
    int8, int4, sparse = evaluation["baselines"]
    sizes = report["size"]["model"]["tensor_bytes"]
    assert int4["bytes"] < int8["bytes"] < sizes["dense"]
    assert 0.99 * sizes["compressed"] < sparse["bytes"] <= sizes["compressed"]
    assert report["size"]["targeted"]["kept"] >= sparse["kept"]
    ours = evaluation["perplexity"]["english"]
    assert int8["perplexity"]["english"] == pytest.approx(ours["dense"], rel=0.05)
    assert evaluation["baseline_comparison"] == compare_with_baselines(
        sizes["compressed"], {"english": ours["compressed"]}, evaluation["baselines"]
    )
    assert report["timing"]["seconds"]["baselines"] > 0

    said = " ".join(ended.out.split())
    card = " ".join((output / "checkpoint/README.md").read_text().split())
    for text in (said, card):
        assert evaluation["baseline_comparison"] in text
        for each in evaluation["baselines"]:
            assert each["name"] in text
            assert f"{each['perplexity']['english']:.3f}" in text
    assert "quality not measured here" not in card

    # The same by hand, with a freshly loaded model.
    plan = Plan.from_json(json.loads((output / "work/executed.json").read_text()))
    targets = baseline_targets(plan, prepare(load_recipe(recipe).recipe, STAGES))
    for written, each in zip(("int8", "int4-g16", "sparse"), (int8, int4, sparse), strict=True):
        baseline = plan_baseline(written, targets)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
        options = load_recipe(recipe).recipe.evaluate
        found = measure(baseline, model.float(), tokenizer, options, lambda *_: None)
        assert each["perplexity"]["english"] == found["english"]["perplexity"]
        assert each["bytes"] == baseline.bytes


def test_measured_baselines_are_not_measured_again(recipe: Path, output: Path) -> None:
    seen: list[str] = []

    def stop_after(stage: str) -> Callable[[str, int, int], None]:
        def on_step(name: str, done: int, total: int) -> None:
            if not seen or seen[-1] != name:
                seen.append(name)
            if name.startswith(stage) and done == total:
                raise Stopped("requested")

        return on_step

    for stage in ("evaluate int4-g16: weights", "evaluate sparse: perplexity"):
        with pytest.raises(Stopped):
            run(recipe, SOME, on_step=stop_after(stage))
        assert not (output / "report.json").exists()
    resumed = run(recipe, SOME, on_step=stop_after("never"))
    evaluated = [stage for stage in seen if stage.startswith("evaluate")]
    names = [stage.partition(":")[0].removeprefix("evaluate ") for stage in evaluated]
    # dense, compressed and int8 once; an interrupted baseline starts again
    assert [n for i, n in enumerate(names) if i == 0 or names[i - 1] != n] == [
        *("dense", "compressed", "dense and compressed", "int8", "int4-g16", "sparse")
    ]
    assert evaluated.count("evaluate int8: weights") == 1
    assert evaluated.count("evaluate sparse: weights") == 2

    seen.clear()
    fewer = run(recipe, "evaluate.baselines=[int4-g16]", on_step=stop_after("never"))
    assert seen == []
    assert fewer["evaluation"]["baselines"] == [resumed["evaluation"]["baselines"][1]]
    assert [each["name"] for each in resumed["evaluation"]["baselines"]] == ORDER


def test_no_baselines_without_a_request(recipe: Path, output: Path) -> None:
    for change in ("evaluate.baselines=[]", "evaluate={baselines: [int8]}"):
        report = run(recipe, change)
        assert (report["evaluation"]["baselines"], report["evaluation"]["baseline_comparison"]) == (
            [],
            None,
        )
        assert "baselines" not in report["timing"]["seconds"]
        assert "quality not measured here" in (output / "README.md").read_text()


def test_a_slice_is_compared_with_all_linears_of_the_dense_model(recipe: Path) -> None:
    stage = "stages=[{slice: {method: drop, keep: 0.9}}]"
    report = run(recipe, stage, "evaluate.baselines=[int4-g16, sparse]", "evaluate.dense=false")
    sizes = report["size"]["model"]["tensor_bytes"]
    assert sizes["compressed"] < sizes["dense"]
    int4, sparse = report["evaluation"]["baselines"]
    assert int4["kept"] == pytest.approx(5 / 16, rel=0.1)
    assert 0.99 * sizes["compressed"] < sparse["bytes"] <= sizes["compressed"]
    assert report["evaluation"]["baseline_comparison"]


def test_an_unknown_baseline_is_refused(
    lrc: Callable[..., Any], recipe: Path, output: Path
) -> None:
    ended = lrc("compress", recipe, "evaluate.baselines=[int4, q4_0]")
    ended.refuses(2, code="unknown-value", where="evaluate.baselines[1]")
    assert not output.exists()
