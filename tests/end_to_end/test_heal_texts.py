"""Healing: where its text comes from, and which texts are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.heal_stages import BLOCK, DISTILL, INT4
from tests.shared_runs import Run, Stopper, changed

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_text_that_is_repeated_is_warned_of(run_stages: Run) -> None:
    report, _ = run_stages(INT4, {"heal": {**DISTILL, "steps": 30, "batch": 32, "rate": 1e-5}})
    (record,) = report["training"]
    assert "is repeated" in record["warning"]
    assert record["warning"] in report["warnings"]


def test_a_text_that_is_extended_is_not_repeated(run_stages: Run) -> None:
    options = {**DISTILL, "steps": 20, "batch": 8, "extend": True, "rate": 1e-3}
    options["cross_entropy"] = 0.3
    report, _ = run_stages(INT4, {"heal": options})
    (record,) = report["training"]
    text = record["text"]
    assert text["training_tokens"] == 20 * 8 * 64 == record["tokens"]
    read = text["text_tokens"] // 64 * 64 - text["held_out_tokens"]
    assert text["written_tokens"] == text["training_tokens"] - read > 0
    assert record["warning"] is None
    assert record["kept"]
    # Steps are judged by the sum of both terms, which are reported separately.
    judged = dict(record["losses"])
    for step, when in {0: "before", record["best_step"]: "after"}.items():
        loss = record[when] + 0.3 * record["cross_entropy"][when]
        assert loss == pytest.approx(judged[step], rel=1e-5)
    assert judged[record["best_step"]] == min(judged.values())


def test_texts_that_do_not_do_are_refused_before_any_work(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    empty, short, copy = (tmp_path / f"{name}.txt" for name in ("empty", "short", "copy"))
    empty.write_text("")
    short.write_text("shorter than one window")
    shutil.copyfile(tiny_text, copy)
    evaluate = {"perplexity": [{"source": str(copy), "name": "mine", "window": 32}]}
    cases = [
        ({**DISTILL, "source": str(empty)}, {}, 1, ("stages[1].heal.source", "is empty")),
        ({**DISTILL, "source": str(short)}, {}, 1, ("stages[1].heal.held_out", "0 windows")),
        ({**DISTILL, "held_out": 10**6}, {}, 1, ("stages[1].heal.held_out", "at most")),
        (DISTILL, {"evaluate": evaluate}, 2, ("calibration.source", "evaluate.perplexity mine")),
    ]
    for number, (options, changes, code, words) in enumerate(cases):
        output = tmp_path / f"run-{number}"
        stages = [INT4, {"heal": options}]
        recipe = tiny_recipe(tiny_model_folder, output, stages=stages, **changes)
        lrc("compress", recipe, "-q").refuses(code, *words)
        assert not (output / "work/compressed").exists()


def test_windows_of_the_source_self_are_used(run_stages: Run, tiny_text: Path) -> None:
    calibration = {"source": "self", "samples": 12, "length": 64}
    report, _ = run_stages(INT4, {"heal": {**DISTILL, "rate": 1e-3}}, calibration=calibration)
    (record,) = report["training"]
    assert record["text"]["source"] == "self"
    assert record["text"]["training_tokens"] == 4 * 64
    assert record["kept"]
    # Calibration on another text leaves none, so that some are sampled.
    calibration["source"] = str(tiny_text)
    few = {**DISTILL, "rate": 1e-3, "source": "self", "length": 32, "steps": 1}
    other, _ = run_stages(INT4, {"heal": {**few, "held_out": 128}}, calibration=calibration)
    assert other["training"][0]["text"]["source"] == "self"
    assert other["training"][0]["text"]["text_tokens"] == (4 + 4) * 32


def test_text_may_come_from_several_sources(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    ours = {str(tiny_text): 0.75, "self": 0.25}
    stages = [
        {"decompose": {"method": "svd-llm", "keep": 0.6}},
        {"heal": {**DISTILL, "rate": 1e-3, "steps": 6}},
        {"heal": {**BLOCK, "steps": 4, "source": {str(tiny_text): 0.5, "python-docs": 0.5}}},
    ]
    changes = {"calibration": {"source": ours, "samples": 16, "length": 64}, "stages": stages}
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", **changes)
    ended = lrc("plan", recipe)
    assert ended.code == 0, ended.err
    text = " ".join(ended.out.split())
    assert f"calibration: 12 windows of {tiny_text}, 4 windows of self" in text
    assert f"6 steps, 1,536 tokens (1,152 tokens of {tiny_text}, 384 tokens of self)" in text
    assert f"(512 tokens of {tiny_text}, 512 tokens of python-docs)" in text
    for calls in (3, 3):
        with pytest.raises(Stopped):
            compress(load_recipe(recipe), Machine(on_step=Stopper(calls)))
    report = compress(load_recipe(recipe))
    found = report["calibration"]
    assert found["source"] == f"75 % {tiny_text}, 25 % self"
    assert [each["tokens"] for each in found["texts"]] == [768, 256]
    first, second = (record["text"]["texts"] for record in report["training"])
    assert [each["source"] for each in first] == [*ours]
    assert [each["held_out_tokens"] for each in first] == [384, 128]
    assert [each["held_out_tokens"] for each in second] == [256, 256]
    again = tiny_recipe(tiny_model_folder, tmp_path / "again", **changes)
    compress(load_recipe(again))
    assert changed(tmp_path / "run", tmp_path / "again") == set()


def test_every_source_of_a_mixture_is_checked(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    wrong = {"c4": 0.5, "wikitext3": 0.5}
    stages = [INT4, {"heal": {**DISTILL, "source": wrong}}]
    recipe = tiny_recipe(
        tiny_model_folder, tmp_path / "run", stages=stages, calibration={"source": wrong}
    )
    ended = lrc("plan", recipe)
    ended.refuses(2, "wikitext3", "did you mean 'wikitext2'?", where="calibration.source")
    assert "c4, self or the path of a .jsonl or .txt file" in ended.err
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    lrc("plan", recipe).refuses(2, "did you mean 'wikitext2'?", where="stages[1].heal.source")
    # A text that is evaluated on may not be trained on, whatever it is mixed with.
    copy = tmp_path / "copy.txt"
    shutil.copyfile(tiny_text, copy)
    mixture = {"python-docs": 0.5, str(tiny_text): 0.5}
    recipe = tiny_recipe(
        tiny_model_folder,
        tmp_path / "run",
        stages=[INT4, {"heal": {**DISTILL, "source": mixture}}],
        evaluate={"perplexity": [{"source": str(copy), "name": "mine", "window": 32}]},
    )
    lrc("compress", recipe, "-q").refuses(2, "heal.source", "evaluate.perplexity mine")
    # Few windows are sampled from the model.
    recipe = tiny_recipe(
        tiny_model_folder,
        tmp_path / "few",
        stages=[INT4, {"heal": {**DISTILL, "source": {"python-docs": 0.5, "self": 0.5}}}],
        calibration={"source": str(tiny_text), "samples": 4, "length": 64},
    )
    ended = lrc("compress", recipe, "-q")
    ended.refuses(1, "raise calibration.samples", where="stages[1].heal.held_out")
