"""Healing: options that contradict each other or find nothing to train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.heal_stages import BLOCK, DISTILL, INT4

pytestmark = pytest.mark.usefixtures("one_thread")


BAD: dict[str, tuple[dict[str, Any], str, str, tuple[str, ...]]] = {
    "an unknown method": (
        {"method": "distil"},
        "",
        "stages[1].heal.method",
        ("did you mean 'distill'", "distill"),
    ),
    "two budgets": (
        {**DISTILL, "tokens": 100},
        "conflicting-keys",
        "stages[1].heal",
        ("'steps', 'tokens' and 'minutes'", "got 'steps' and 'tokens'", "keep one"),
    ),
    "a batch larger than any memory": (
        {**DISTILL, "batch": 5000},
        "",
        "stages[1].heal.batch",
        ("<= 4096, got 5000",),
    ),
    "more than a week": (
        {"method": "distill", "minutes": 20000},
        "",
        "stages[1].heal.minutes",
        ("<= 10080, got 20000",),
    ),
    "text without a number of tokens": (
        {"method": "distill", "minutes": 1, "extend": True},
        "",
        "stages[1].heal",
        ("'extend' needs a number of tokens", "got 'minutes'", "give 'tokens' or 'steps'"),
    ),
    "too many Kronecker products": (
        {**DISTILL, "train": "compacter", "terms": 1000},
        "",
        "stages[1].heal.terms",
        ("<= 64, got 1000",),
    ),
    "no text of that name": (
        {**DISTILL, "source": "wikitext3"},
        "",
        "stages[1].heal.source",
        ("wikitext2",),
    ),
    "no masks": (
        {**DISTILL, "train": "values"},
        "nothing-to-train",
        "stages[1].heal.train",
        ("no masks", "such as all"),
    ),
    "no masks to move": (
        {**DISTILL, "support": "moving"},
        "nothing-to-train",
        "stages[1].heal.support",
        ("masks or dictionaries", "remove the key"),
    ),
    "places of what is not trained": (
        {**DISTILL, "train": "norms", "support": "moving"},
        "conflicting-keys",
        "stages[1].heal",
        ("values or all", "got norms"),
    ),
    "no factors": (
        {**BLOCK, "train": "factors"},
        "nothing-to-train",
        "stages[1].heal.train",
        ("no low-rank components",),
    ),
    "no factors to lower the ranks of": (
        {**DISTILL, "nuclear_norm": 1e-4},
        "nothing-to-train",
        "stages[1].heal.nuclear_norm",
        ("low_rank components", "storage: low_rank"),
    ),
    "a window that is too long": (
        {**DISTILL, "length": 300},
        "",
        "stages[1].heal.length",
        ("at most 256",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_error(plan_stages: Callable[..., Any], case: str) -> None:
    options, code, where, words = BAD[case]
    plan_stages(INT4, {"heal": options}).refuses(2, *words, code=code, where=where)


def test_scales_need_integers(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    stages = [{"decompose": {"method": "svd", "keep": 0.6}}, {"heal": {"method": "scales"}}]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    lrc("plan", recipe).refuses(2, "no integers", where="stages[1].heal.method")
    # Not even the allocation that has yet to be made can choose one.
    mixed = {"method": "mixed", "keep": 0.6, "components": ["sparse"]}
    stages = [{"decompose": mixed}, {"heal": {**BLOCK, "train": "factors"}}]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    lrc("plan", recipe).refuses(2, "no low-rank components", where="stages[1].heal.train")
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=[{"heal": DISTILL}])
    lrc("plan", recipe).refuses(2, "add a 'decompose'", where="stages[0].heal")
