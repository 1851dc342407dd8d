"""The warning about calibration text with little of the vocabulary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrc.compressors.calibrate.calibration_windows import vocabulary_warning


def test_a_text_of_few_words_is_warned_of_once_and_in_the_report(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    output: Path,
    tmp_path: Path,
) -> None:
    text = tmp_path / "repeated.txt"
    text.write_text("ab " * 2000, encoding="utf-8")
    calibration = {"source": str(text), "samples": 4, "length": 64}
    recipe = tiny_recipe(tiny_model_folder, output, calibration=calibration)
    ended = lrc("compress", recipe)
    assert ended.code == 0
    report = json.loads((output / "report.json").read_text())
    used, size = (report["calibration"]["vocabulary"][key] for key in ("used", "size"))
    assert size == 512
    assert 1 <= used < 10
    (warning,) = [each for each in report["warnings"] if "vocabulary" in each]
    assert f"has {used} of the 512 tokens" in warning
    assert ended.err.count(warning) == 1


def test_varied_text_is_not_warned_of() -> None:
    assert vocabulary_warning({"vocabulary": {"used": 11, "size": 512}}) is None
    assert vocabulary_warning({"vocabulary": {"used": 10, "size": 512}}) is not None
    assert vocabulary_warning(None) is None
    assert vocabulary_warning({"source": "c4"}) is None
