"""The sections of a page that compares several runs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lrc.compressors.evaluate.scores import SHARED
from lrc.compressors.page import charts
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.gate_parts import HEAD, gate_rows
from lrc.compressors.page.number_text import percent_text, score_text, seconds_text
from lrc.compressors.page.parts import Part, Section, Table, Text, figures, tables
from lrc.compressors.page.quality_parts import Row, model_rows, points_of
from lrc.compressors.page.run_parts import environment, recipe
from lrc.compressors.page.saved_runs import SavedRun
from lrc.configs.size import size_text


def compared(runs: Sequence[SavedRun], page: Page) -> list[Section]:
    """Return the sections that compare runs, and the recipe of every run."""
    named = _distinct(runs)
    found = [
        Section("comparison", "Comparison", _table(named)),
        Section("quality", "Size and quality", _quality(named, page)),
        Section("tasks", "Tasks", _tasks(named)),
        Section("gates", "Gates", _gates(named)),
        Section("timing", "Time and memory", _timings(named)),
        *(
            Section(f"run-{number}", name, [*recipe(run, page), *environment(run, page)])
            for number, (name, run) in enumerate(named.items(), start=1)
        ),
    ]
    return [section for section in found if section.parts]


def _distinct(runs: Sequence[SavedRun]) -> dict[str, SavedRun]:
    """Return the runs by name; a number distinguishes equal names."""
    found: dict[str, SavedRun] = {}
    for run in runs:
        name, number = run.name, 2
        while name in found:
            name, number = f"{run.name} ({number})", number + 1
        found[name] = run
    return found


def _table(runs: dict[str, SavedRun]) -> list[Part]:
    texts = _texts(runs)
    return [
        *tables(
            "Sizes",
            ["run", "weight files", "of dense", "targeted kept"],
            ([f"{name}: {_stages(run)}", *_sizes(run)] for name, run in runs.items()),
        ),
        *tables(
            "Perplexity per token, and its ratio to that of the dense model",
            ["run", *_heads(texts)],
            ([name, *_scores(run, texts)] for name, run in runs.items() if texts),
        ),
    ]


def _heads(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        yield text
        yield "ratio"


def _sizes(run: SavedRun) -> Iterator[str]:
    size = run.report["size"]
    files = size["model"]["file_bytes"]
    yield size_text(files["compressed"])
    yield percent_text(files["compressed"] / files["dense"])
    yield percent_text(size["targeted"]["kept"]) if run.report["layers"] else ""


def _scores(run: SavedRun, texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        entry = run.report["evaluation"]["perplexity"].get(text)
        yield "" if entry is None else score_text(entry["compressed"])
        yield "" if entry is None or entry["ratio"] is None else f"{entry['ratio']:.3f}"


def _stages(run: SavedRun) -> str:
    found = (
        f"{kind} {options['method']}"
        for stage in run.report["recipe"]["stages"]
        for kind, options in stage.items()
    )
    return ", ".join(found)


def _texts(runs: dict[str, SavedRun]) -> list[str]:
    """Return the evaluation texts of all runs."""
    names = (name for run in runs.values() for name in run.report["evaluation"]["perplexity"])
    return list(dict.fromkeys(names))


def _quality(runs: dict[str, SavedRun], page: Page) -> list[Part]:
    plots, notes = [], []
    for text in _texts(runs):
        measured = {n: r for n, r in runs.items() if text in r.report["evaluation"]["perplexity"]}
        if differing := _differing(measured, text):
            notes.append(
                Text(
                    f"Perplexities on {text} are not compared in a plot: the runs differ in "
                    f"{', '.join(differing)}.",
                    warning=True,
                )
            )
            continue
        points = points_of(_rows(measured), text)
        caption = (
            f"Size and perplexity on {text}; lower left is better. Baselines have empty markers."
        )
        plots.append((charts.size_and_quality(page, text, points), caption))
    return [*notes, *figures(*plots)]


def _differing(runs: dict[str, SavedRun], text: str) -> list[str]:
    """Return the properties in which measurements on a text differ."""
    entries = [run.report["evaluation"]["perplexity"][text] for run in runs.values()]
    keys = [key for key in SHARED if any(entry[key] != entries[0][key] for entry in entries)]
    models = {run.report["recipe"]["model"]["path"] for run in runs.values()}
    return [*keys, *(["the source model"] if len(models) > 1 else [])]


def _rows(runs: dict[str, SavedRun]) -> list[Row]:
    """Return all models; dense ones and baselines of equal size and scores only once."""
    found: dict[Any, Row] = {}
    for name, run in runs.items():
        for row in model_rows(run, name):
            found.setdefault((row[0], row[1], *row[2].values()), row)
    return [*found.values()]


def _tasks(runs: dict[str, SavedRun]) -> list[Part]:
    def value(run: SavedRun, task: str, metric: str) -> str:
        entry = run.report["evaluation"]["tasks"].get(task, {}).get(metric)
        if entry is None:
            return ""
        error = entry["stderr"]["compressed"]
        return f"{entry['compressed']:.4f}" + (f" ± {error:.4f}" if error is not None else "")

    names = dict.fromkeys(
        (task, metric)
        for run in runs.values()
        for task, metrics in run.report["evaluation"]["tasks"].items()
        for metric in metrics
    )
    return tables(
        "Scores of tasks ± standard error",
        ["task", *runs],
        ([f"{t} {m}", *(value(run, t, m) for run in runs.values())] for t, m in names),
    )


def _gates(runs: dict[str, SavedRun]) -> list[Part]:
    rows = (
        [f"{name}: {row.gate}", *row.cells[1:]]
        for name, run in runs.items()
        for row in gate_rows(run)
    )
    return tables("Thresholds of the recipes; x: relative to the dense model", HEAD, rows)


def _timings(runs: dict[str, SavedRun]) -> list[Part]:
    write: dict[str, Callable[[SavedRun], str]] = {
        "wall time": lambda run: seconds_text(sum(run.report["timing"]["seconds"].values())),
        "peak memory": lambda run: size_text(run.report["memory"]["peak_rss_bytes"]),
        "device": lambda run: str(run.report["environment"]["device"]),
    }
    rows = [[name, *(text(run) for text in write.values())] for name, run in runs.items()]
    return [Table("Time and memory of the runs", ["run", *write], rows)]
