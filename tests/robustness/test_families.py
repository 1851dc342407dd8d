"""Every causal language model of transformers is compressed correctly, or rejected by the plan."""

import re
from pathlib import Path

import pytest
import transformers
from tests.robustness.sweep import outcomes, warm_up
from tests.robustness.tiny_models import causal_families

SAMPLE = {"bart", "falcon", "gemma3", "gpt2", "mamba", "qwen3_moe"}
"""Families of `make test`: all others are left to `make robustness`."""
MODELS = Path(__file__).parents[2] / "MODELS.md"

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of classes that transformers itself deprecates
]


@pytest.fixture(scope="module")
def warm() -> None:
    warm_up()


def documented() -> dict[str, str]:
    """Return family -> status in the documentation, if that is about the installed version."""
    text = MODELS.read_text(encoding="utf-8")
    if f"With transformers {transformers.__version__}," not in text:
        return {}
    found, status = {}, ""
    for line in text.splitlines():
        if heading := re.match(r"### (\w+)", line):
            status = {"Supported": "served", "Rejected": "rejected"}.get(heading[1], "not built")
        elif status and (row := re.match(r"\| ([\w.-]+) \|", line)):
            found[row[1]] = status
    return found


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.robustness)
        for name in sorted(causal_families())
    ],
)
def test_a_family_is_compressed_correctly_or_rejected_by_the_plan(family: str, warm: None) -> None:
    (outcome,) = outcomes([family])
    assert not outcome.failures
    assert outcome.status == documented().get(family, outcome.status), outcome.reason
    if outcome.status == "rejected":
        assert outcome.seconds < 5


def test_the_sample_consists_of_known_families() -> None:
    assert causal_families().keys() >= SAMPLE
