"""Elastic checkpoints: recipes that contradict themselves, and damaged tables."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.elastic_runs import BUDGETS, REFINED, SVD_LLM
from tests.shared_runs import Run
from transformers import AutoModelForCausalLM

from lrc.configs.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(run_stages: Run) -> Run:
    """Checkpoints are made on the CPU."""
    return partial(run_stages, device="cpu")


BAD: dict[str, tuple[list[dict[str, Any]], str, str, tuple[str, ...]]] = {
    "a budget above 1": (
        [{"decompose": {**SVD_LLM, "elastic": [1.2, 0.8]}}],
        "",
        "stages[0].decompose.elastic[0]",
        ("<= 1, got 1.2",),
    ),
    "a budget of 0": (
        [{"decompose": {**SVD_LLM, "elastic": [0.8, 0]}}],
        "",
        "stages[0].decompose.elastic[1]",
        ("got 0",),
    ),
    "a budget of 1": (
        [{"decompose": {**SVD_LLM, "elastic": [1, 0.8]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("'elastic' must list budgets below 1", "[1, 0.8]"),
    ),
    "no budget": (
        [{"decompose": {**SVD_LLM, "elastic": []}}],
        "",
        "stages[0].decompose.elastic",
        ("got []", "add at least 1 entry"),
    ),
    "a single budget": (
        [{"decompose": {**SVD_LLM, "elastic": [0.8]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("two or more budgets, got [0.8]",),
    ),
    "an ascending list": (
        [{"decompose": {**SVD_LLM, "elastic": [0.6, 0.8]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("from the largest to the smallest, got [0.6, 0.8]", "write [0.8, 0.6]"),
    ),
    "a budget twice": (
        [{"decompose": {**SVD_LLM, "elastic": [0.8, 0.8, 0.6]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("different budgets", "write [0.8, 0.6]"),
    ),
    "two kinds of budgets": (
        [{"decompose": {**SVD_LLM, "keep": 0.9}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("exactly one of 'keep', 'size', 'elastic' and 'drafter'", "got keep and elastic"),
    ),
    "a method without ranks": (
        [{"decompose": {"method": "sparse", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("'elastic' cannot be combined with method: sparse", "no order", "svd-llm or kfac"),
    ),
    "a method with biases": (
        [{"decompose": {"method": "lord", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("method: lord", "biases"),
    ),
    "shared factors": (
        [{"decompose": {"method": "basis-sharing", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("method: basis-sharing", "share a factor"),
    ),
    "several component types": (
        [{"decompose": {"method": "mixed", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("method: mixed",),
    ),
    "budgets in multiply-adds": (
        [{"decompose": {**SVD_LLM, "measure": "macs"}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("measure: macs", "set measure: bits"),
    ),
    "a plan": (
        [{"decompose": {**SVD_LLM, "plan": "plan.json"}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("plan: plan.json", "remove 'plan'"),
    ),
    "thresholds": (
        [{"decompose": {**SVD_LLM, "allocation": "heavy-tail"}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("allocation: heavy-tail", "set allocation: uniform or lagrangian"),
    ),
    "pivot rows with compensation": (
        [{"decompose": {**REFINED, "compensate": {}}}],
        "conflicting-keys",
        "stages[0].decompose",
        (
            "'elastic' cannot be combined with 'compensate' and storage: pivoted_low_rank",
            "remove 'compensate' and add a 'heal' stage, or set storage: low_rank",
        ),
    ),
    "a floor above the smallest budget": (
        [{"decompose": {**SVD_LLM, "min_keep": 0.65}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("'min_keep' must be at most the smallest of 'elastic', 0.6, got 0.65",),
    ),
    "integers": (
        [{"decompose": SVD_LLM}, {"quantize": {"method": "rtn", "bits": 8}}],
        "contradiction",
        "stages[0].decompose.elastic",
        ("later 'quantize'",),
    ),
    "groups of integers, to which ranks would be rounded": (
        [{"decompose": SVD_LLM}, {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}],
        "contradiction",
        "stages[0].decompose.elastic",
        ("later 'quantize'",),
    ),
    "different budgets of two stages": (
        [
            {"decompose": {**SVD_LLM, "targets": ["*.mlp.*"]}},
            {"decompose": {**SVD_LLM, "targets": ["*.self_attn.*"], "elastic": [0.9, 0.5]}},
        ],
        "contradiction",
        "stages[1].decompose.elastic",
        ("[0.9, 0.8, 0.7, 0.6]", "got [0.9, 0.5]"),
    ),
    "a fit of layers": (
        [{"decompose": SVD_LLM}, {"heal": {"method": "block"}}],
        "contradiction",
        "stages[1].heal.method",
        ("must be distill after a stage with 'elastic', got block",),
    ),
    "a budget that ranks cannot meet": (
        [{"decompose": {**SVD_LLM, "elastic": [0.9, 0.02]}}],
        "infeasible-budget",
        "stages[0].decompose.elastic",
        ("raise the smallest budget",),
    ),
    "a budget that an allocation cannot meet": (
        [{"decompose": {**SVD_LLM, "elastic": [0.9, 0.02], "allocation": "lagrangian"}}],
        "infeasible-budget",
        "stages[0].decompose.elastic",
        ("must be at least", "got 0.02", "raise elastic"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_error(plan_stages: Callable[..., Any], case: str) -> None:
    stages, code, where, words = BAD[case]
    plan_stages(*stages).refuses(2, *words, code=code, where=where)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a newer version": (lambda b: b["elastic"].update(version=2), "upgrade lrc"),
    "no budgets": (lambda b: b["elastic"].pop("budgets"), "'version' and 'budgets'"),
    "ascending budgets": (lambda b: b["elastic"]["budgets"].reverse(), "descending order"),
    "a budget too many": (lambda b: b["elastic"]["budgets"].append(0.1), "one rank for each"),
    "budgets of another kind": (lambda b: b["elastic"].update(budgets="all"), "budgets must be"),
    "no table": (lambda b: b.pop("elastic"), "one rank for each of the 0 budgets"),
    "a list": (lambda b: b.update(elastic=[0.9, 0.8]), "must be an object"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_table_is_refused(
    run: Run, lrc: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    _, output = run({"decompose": SVD_LLM})
    shutil.copytree(output / "checkpoint", tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged/lrc")
    path = tmp_path / "damaged/config.json"
    config = json.loads(path.read_text())
    change, words = DAMAGE[case]
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    lrc("inspect", tmp_path / "damaged").refuses(1, words)
    lrc("export", tmp_path / "damaged", tmp_path / "out", "--keep", 0.7).refuses(1, words)
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")
