"""Evaluation layer by layer measures what whole models give, with one layer in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(evaluation: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested JSON values by their paths."""
    if isinstance(evaluation, dict):
        return {k: v for name in evaluation for k, v in numbers(evaluation[name], f"{key}/{name}").items()}
    if isinstance(evaluation, list):
        return {k: v for i, part in enumerate(evaluation) for k, v in numbers(part, f"{key}/{i}").items()}
    return {key: evaluation}


def assert_same(found, expected) -> None:
    a, b = numbers(found), numbers(expected)
    assert a.keys() == b.keys()
    for key in b:
        if isinstance(b[key], float):
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=1e-6), key
        else:
            assert a[key] == b[key], key


def run(recipe: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return compress(load_recipe(recipe, overrides), Machine("cpu", **options))


def test_x(recipe):
    a = run(recipe, "evaluate.baselines=[int8, int4-g16, sparse]", "evaluate.streaming=never")
    b = run(recipe, "evaluate.baselines=[int8, int4-g16, sparse]", "evaluate.streaming=always", overwrite=True)
    assert_same(b["evaluation"], a["evaluation"])
