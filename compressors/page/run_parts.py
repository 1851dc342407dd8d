"""Sections about the run itself: time, text, recipe, environment, and what is missing."""

from collections.abc import Callable, Iterable
from typing import Any

import yaml

from lrc.compressors.page import charts
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.number_text import seconds_text
from lrc.compressors.page.parts import Code, Part, Table, figures, tables
from lrc.compressors.page.saved_runs import SavedRun
from lrc.configs.size import size_text

PEAKS = (
    ("peak memory", "peak_rss_bytes", "host_bytes"),
    ("peak GPU memory", "peak_gpu_bytes", "gpu_bytes"),
    ("peak disk space", "peak_disk_bytes", "disk_bytes"),
)
"""Name, key of the report's `memory`, and key of its estimate."""


def timings(run: SavedRun, page: Page) -> list[Part]:
    """Return wall times and peaks of memory and disk, next to what was estimated."""
    seconds, memory = run.report["timing"]["seconds"], run.report["memory"]
    if not seconds:
        return []
    expected = run.report.get("estimate") or {"seconds": {}, "peak": {}}  # earlier versions
    guessed = expected["seconds"]

    def cells(value: float | None, text: Callable[[Any], str]) -> str:
        return "" if value is None else text(value)

    rows = [
        [name, seconds_text(value), cells(guessed.get(name), seconds_text)]
        for name, value in seconds.items()
    ]
    total = sum(guessed.values()) or None
    rows.append(["all phases", seconds_text(sum(seconds.values())), cells(total, seconds_text)])
    rows += [
        [name, size_text(memory[key]), cells(expected["peak"].get(guess), size_text)]
        for name, key, guess in PEAKS
        if memory.get(key) is not None
    ]
    figure = charts.durations(page, [*seconds.items()])
    return [
        *figures((figure, "Wall time; after an interruption, the sum over all attempts.")),
        *tables("Wall time, memory and disk", ["", "value", "estimate"], rows),
    ]


def calibration(run: SavedRun, page: Page) -> list[Part]:
    """Return the calibration text."""
    found = run.report["calibration"]
    if found is None:
        return []
    return [Table("Calibration", ["", "value"], [*_rows(found)], numbers=False)]


def recipe(run: SavedRun, page: Page) -> list[Part]:
    """Return the recipe as it was written, if known, and in full."""
    full = yaml.safe_dump(run.report["recipe"], sort_keys=False, allow_unicode=True)
    written = [] if run.recipe is None else [Code(run.recipe)]
    return [*written, Code(full, "In full, with overrides of the command line and defaults")]


def environment(run: SavedRun, page: Page) -> list[Part]:
    """Return versions and machine."""
    found = {**run.report["environment"], "seed": run.report["seed"]}
    return [Table("Environment", ["", "value"], [*_rows(found)], numbers=False)]


def _rows(values: Any, prefix: str = "") -> Iterable[list[str]]:
    """Yield a row for every value of nested objects and lists."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values, start=1)
    for key, value in pairs:
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict | list):
            yield from _rows(value, f"{name}, ")
        else:
            yield [name, f"{value:,}" if type(value) is int else str(value)]


def missing(run: SavedRun, page: Page) -> list[Part]:
    """Return what has not been measured, and how to measure it."""
    report = run.report
    absent = []
    if not report["evaluation"]["perplexity"]:
        absent.append(("perplexity", "add texts to 'evaluate.perplexity'"))
    texts = report["evaluation"]["perplexity"].values()
    if texts and all(entry.get("in_domain") for entry in texts):
        absent.append(
            (
                "text of another kind than the calibration text, on which the model loses more",
                "add one to 'evaluate.perplexity'",
            )
        )
    if not report["evaluation"]["tasks"]:
        absent.append(("task scores", "add tasks of lm-eval to 'evaluate.tasks'"))
    if report["speed"] is None:
        absent.append(("speed", "run `lrc bench` with the checkpoint and --report"))
    predicted = any(each["predicted_nats"] is not None for each in report["layers"])
    if report["layers"] and report.get("profile") is None:
        absent.append(
            (
                "measured loss of single matrices",
                "run `lrc plan` with --profile before `lrc compress`",
            )
        )
    if report["layers"] and not predicted:
        absent.append(("predicted loss increases", "choose a method that uses output gradients"))
    if not absent:
        return []
    return [Table("Not in this report", ["", "to add it"], absent, numbers=False)]
