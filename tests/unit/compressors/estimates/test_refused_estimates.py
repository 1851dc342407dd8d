"""What is shown of an estimate, and runs that cannot fit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.estimated_recipes import (
    KFAC,
)

from lrc.compressors.estimates import estimate as estimates
from lrc.compressors.estimates.estimate import Estimate, estimate, refuse_too_large
from lrc.compressors.prepare import Prepared
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Perplexity
from lrc.configs.task_data import EvaluationTask

TEXT = Perplexity(source="python-docs")


def _with_free(monkeypatch: pytest.MonkeyPatch, memory: int, disk: int) -> None:
    class Available:
        available = memory

    monkeypatch.setattr(estimates.psutil, "virtual_memory", lambda: Available)
    monkeypatch.setattr(estimates, "free_disk", lambda folder: disk)


@pytest.mark.usefixtures("known_rates")
def test_what_fits_is_not_refused(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared(KFAC)
    _with_free(monkeypatch, 2**40, 2**40)
    refuse_too_large(estimate(recipe, "cpu"), recipe, "cpu")


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize(
    ("stage", "changes", "where"),
    [
        ("calibrate", {}, "calibration.memory_limit_gib"),
        ("evaluate", {"perplexity": [TEXT]}, "evaluate.streaming"),
        ("evaluate", {"perplexity": [TEXT], "streaming": "always"}, "evaluate.perplexity"),
        ("evaluate", {"task": EvaluationTask(data="t.csv")}, "evaluate.task"),
    ],
)
def test_the_refusal_names_a_setting_that_the_recipe_can_use(
    stage: str,
    changes: dict[str, Any],
    where: str,
    prepared: Callable[..., Prepared],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = prepared(KFAC)
    evaluate = recipe.recipe.evaluate.model_copy(update=changes)
    recipe = replace(recipe, recipe=recipe.recipe.model_copy(update={"evaluate": evaluate}))
    _with_free(monkeypatch, 2**40, 2**40)
    expected = Estimate({}, {"save": 1, stage: 2**50}, {}, {"save": 1}, [])
    with pytest.raises(RecipeError, match=r"1,048,576.0 GiB of host memory") as error:
        refuse_too_large(expected, recipe, "cpu")
    (problem,) = error.value.problems
    assert (problem.code, problem.where) == ("does-not-fit", where)


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_commands_refuse_a_run_for_which_the_disk_is_too_small(
    command: str,
    lrc: Callable[..., Any],
    written: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = written(KFAC)
    _with_free(monkeypatch, 2**40, 1000)
    ended = lrc(command, recipe)
    ended.refuses(2, "GiB of disk in", code="does-not-fit", where="output")
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left <= {"work", "lock", "run.json", "seconds.json"}


@pytest.mark.usefixtures("known_rates")
def test_plan_shows_estimates(lrc: Callable[..., Any], written: Callable[..., Path]) -> None:
    recipe = written(KFAC)
    shown = lrc("plan", recipe)
    assert shown.code == 0
    assert "estimate: calibrate" in shown.out
    values = json.loads(lrc("plan", recipe, "--json").out)["estimate"]
    assert values["peak"]["gpu_bytes"] is None
    assert values["peak"]["host_bytes"] == max(values["host_bytes"].values())
    assert values["processes"] == 1
    shown = lrc("plan", recipe, "--processes", 2)
    assert "of each of 2 processes" in " ".join(shown.out.split())
    refused = lrc("plan", recipe, "--processes", 200)
    assert refused.code == 2
    assert "calibration.samples: must be at least the number of processes, 200" in refused.err


@pytest.mark.usefixtures("known_rates")
def test_what_is_not_estimated_is_named(prepared: Callable[..., Prepared], tiny_text: Path) -> None:
    """As the only test, this one finds a task in the index of lm-eval, which takes seconds."""
    evaluate = {
        "perplexity": [{"source": str(tiny_text), "name": "all", "window": 64}],
        "tasks": ["piqa"],
        "generations": {"prompts": ["A"]},
    }
    found = estimate(prepared(KFAC, evaluate=evaluate), "cpu").not_estimated
    assert found == ["perplexity on the whole of all", "task piqa", "generated text"]


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": {"source": "self", "samples": 4, "length": 64}},
        {"stages": [*KFAC, {"heal": {"method": "distill", "extend": True}}]},
        {
            "stages": [
                *KFAC,
                {"heal": {"method": "block", "source": {"python-docs": 0.5, "self": 0.5}}},
            ]
        },
    ],
    ids=["calibration", "extend", "source"],
)
@pytest.mark.usefixtures("known_rates")
def test_sampling_text_is_not_estimated(
    prepared: Callable[..., Prepared], changes: dict[str, Any]
) -> None:
    stages = changes.get("stages", KFAC)
    written = "text that the dense model writes"
    others = {key: value for key, value in changes.items() if key != "stages"}
    assert estimate(prepared(stages, **others), "cpu").not_estimated == [written]
    assert estimate(prepared(KFAC), "cpu").not_estimated == []
