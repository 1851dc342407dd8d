"""Calibration on conversations, with a loss on the answers only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.compressors.corpus.test_answers import CHAT, TEMPLATE

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipe(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., Path]:
    """Write a recipe with options of the calibration, for a model with a chat template."""
    model, chat = tmp_path / "model", tmp_path / "chat.jsonl"
    shutil.copytree(tiny_model_folder, model)
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(model)
    chat.write_text(f"{json.dumps({'messages': CHAT})}\n" * 20, encoding="utf-8")
    options = {"source": str(chat), "samples": 6, "length": 32, "chat_template": True}

    def write(*stages: dict[str, Any], **changes: Any) -> Path:
        stages = stages or ({"decompose": {"method": "kfac", "keep": 0.6}},)
        calibration = {**options, "loss": "answers", **changes}
        return tiny_recipe(model, tmp_path / "run", stages=[*stages], calibration=calibration)

    return write


def test_the_report_counts_the_tokens_and_other_matrices_are_chosen(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    reports = {}
    for loss in ("answers", "all"):
        made = load_recipe(recipe(loss=loss), [f"output={tmp_path / loss}"])
        reports[loss] = compress(made, Machine("cpu"))
    counted = reports["answers"]["calibration"].pop("loss_tokens")
    assert 0 < counted < 6 * 32 / 2
    assert reports["answers"]["calibration"] == reports["all"]["calibration"]
    answers, everything = (
        sum(layer["predicted_nats"] or 0 for layer in reports[loss]["layers"]) for loss in reports
    )
    assert 0 < answers < everything  # of all tokens, fewer have a loss


def test_text_of_the_model_counts_whole(recipe: Callable[..., Path], tmp_path: Path) -> None:
    source = {str(tmp_path / "chat.jsonl"): 0.5, "self": 0.5}
    report = compress(load_recipe(recipe(source=source)), Machine("cpu"))
    assert 3 * 32 < report["calibration"]["loss_tokens"] < 6 * 32


def test_healing_has_its_loss_on_answers(recipe: Callable[..., Path], tmp_path: Path) -> None:
    rtn = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}
    options = {"method": "distill", "steps": 4, "batch": 4, "rate": 0.001, "held_out": 128}
    records = {}
    for loss in ("answers", "all"):
        written = recipe(rtn, {"heal": options}, loss=loss)
        made = load_recipe(written, [f"output={tmp_path / loss}"])
        (records[loss],) = compress(made, Machine("cpu"))["training"]
    text = records["answers"]["text"]
    counted = text.pop("loss_tokens")
    assert text == records["all"]["text"]
    assert 0 < counted < text["training_tokens"] / 2
    assert records["answers"]["kept"]
    assert records["answers"]["before"] != records["all"]["before"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"chat_template": False}, 2, "loss: answers needs conversations"),
        ({"source": "questions.jsonl"}, 1, "needs windows with an assistant's message, got none"),
    ],
)
def test_text_without_answers_is_refused(
    changes: dict[str, Any],
    code: int,
    words: str,
    recipe: Callable[..., Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"messages": CHAT[:1]})
    Path("questions.jsonl").write_text(f"{row}\n" * 40, encoding="utf-8")
    lrc("compress", recipe(**changes), "-q").refuses(code, words)
