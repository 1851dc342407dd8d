"""Every language model of transformers is compressed correctly, or rejected by the plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from tests.robustness.family_check import Outcome
from tests.robustness.table import read_rows, with_outcomes
from tests.robustness.tiny_models import causal_families

SAMPLE = ("bart", "falcon", "gemma3", "gpt2", "mamba", "qwen3_moe")
"""Families of `make test`: all others are left to `make robustness`."""
ROOT = Path(__file__).parents[2]


def documented() -> dict[str, str]:
    """Return family -> status in the documentation, if that is about the installed version."""
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    if f"With transformers {transformers.__version__}," not in page:
        return {}
    return {family: status for status, rows in read_rows(page).items() for family in rows}


@pytest.mark.parametrize(
    "families",
    [
        pytest.param(SAMPLE, id="sample"),
        pytest.param((), id="all", marks=pytest.mark.robustness),
    ],
)
def test_families_are_compressed_correctly_or_rejected_by_the_plan(
    families: tuple[str, ...], tmp_path: Path
) -> None:
    # In a process of its own, because it forks: threads of this one would be missing in a child.
    records = tmp_path / "outcomes.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.sweep", *families, "--json", records],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert records.is_file(), done.stderr
    outcomes = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert {o["family"] for o in outcomes} == {*(families or causal_families())}
    assert not {o["family"]: o["failures"] for o in outcomes if o["failures"]}
    known = documented()
    changed = {
        o["family"]: o for o in outcomes if known.get(o["family"], o["status"]) != o["status"]
    }
    assert not changed
    slow = {o["family"]: o["seconds"] for o in outcomes if o["status"] == "rejected"}
    assert not {family: seconds for family, seconds in slow.items() if seconds > 5}


def test_the_rows_of_checked_families_are_replaced() -> None:
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    before = read_rows(page)
    outcomes = [
        Outcome("llama", status="rejected", reason="model: X (model_type 'x') is not supported"),
        Outcome("gpt2", "GPT2LMHeadModel", "served", compressed=0.5),
    ]
    after = read_rows(with_outcomes(page, outcomes, everything=False))
    assert after["rejected"]["llama"] == "| llama | X (model_type 'x') is not supported |"
    assert after["served"]["gpt2"] == "| gpt2 | GPT2LMHeadModel | 50% | yes | no | no |"
    assert after["served"].keys() == before["served"].keys() - {"llama"} | {"gpt2"}
    assert after["not built"] == before["not built"]
    assert read_rows(with_outcomes(page, [], everything=False)) == before
    assert read_rows(with_outcomes(page, outcomes[:1], everything=True))["served"] == {}
