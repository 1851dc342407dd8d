"""Plans of users that do not match the model, or are no plans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.models.weights import WeightReader


def of_first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """Change the configuration of the first task."""
    return lambda plan: plan["tasks"][0]["config"].update(changes)


def components(*changed: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return of_first(components=[*changed])


def add_unknown(plan: dict[str, Any]) -> None:
    weights = [{"name": "model.layers.9.up", "layer": 9}]
    plan["tasks"].append({**plan["tasks"][0], "weights": weights})


PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], str, tuple[str, ...]]] = {
    "a matrix missing": (lambda plan: plan["tasks"].pop(0), "missing-layer", ("q_proj",)),
    "an unknown name": (add_unknown, "unknown-layer", ("model.layers.9.up",)),
    "another shape": (of_first(shape=[64, 32]), "unequal-shapes", ("[32, 32]", "[64, 32]")),
    "a rank too large": (
        components({"type": "low_rank", "rank": 40}),
        "size-out-of-range",
        ("[1, 32]", "got 40"),
    ),
    "a rank that saves nothing": (
        components({"type": "low_rank", "rank": 20}),
        "size-out-of-range",
        ("20", "at most 15"),
    ),
    "an unknown type": (components({"type": "wavelet"}), "invalid-user-plan", ("'wavelet'",)),
    "a type of another method": (
        components({"type": "sparse", "nonzeros": 100}),
        "wrong-component",
        ("low_rank or pivoted_low_rank", "got sparse"),
    ),
    "a type without its size": (
        components({"type": "sparse"}),
        "invalid-user-plan",
        ("'nonzeros'", "got None"),
    ),
    "no list": (lambda plan: plan.pop("tasks"), "invalid-user-plan", ("'tasks'",)),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_do_not_match_the_model(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, code, words = PLANS[case]
    plan = json.loads(lrc("plan", recipe, "--json").out)
    spoil(plan)
    file = recipe.with_name("plan.json")
    file.write_text(json.dumps(plan))
    monkeypatch.setattr(WeightReader, "read", None)
    given = f"stages=[{{decompose: {{method: svd-llm, plan: {file}}}}}]"
    for command in ("plan", "compress"):
        lrc(command, recipe, given).refuses(2, str(file), *words, code=code)
    assert not output.exists()


def test_files_that_are_not_plans(lrc, recipe: Path, output: Path) -> None:
    file = recipe.with_name("plan.json")
    given = f"stages=[{{decompose: {{method: svd-llm, plan: {file}}}}}]"
    where = "stages[0].decompose.plan"
    lrc("compress", recipe, given).refuses(2, str(file), code="unreadable-file", where=where)
    for content in (b"\xff\x00", b'{"tasks": [', b"[1]", b'{"version": 1, "tasks": []}'):
        file.write_bytes(content)
        lrc("compress", recipe, given).refuses(2, str(file), code="invalid-user-plan", where=where)
    assert not output.exists()
