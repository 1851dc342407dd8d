"""Sections about size, quality, speed and baselines."""

from collections.abc import Iterator, Mapping
from typing import Any

from lrc.compressors.benchmark.results import PHASES
from lrc.compressors.page import charts
from lrc.compressors.page.charts import Interval, Point
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.gate_parts import gate_rows, passed_text
from lrc.compressors.page.matrices import matrices_of
from lrc.compressors.page.number_text import percent_text, score_text
from lrc.compressors.page.parts import Facts, Part, Table, Text, figures, tables
from lrc.compressors.page.prediction_parts import divergences
from lrc.compressors.page.saved_runs import SavedRun
from lrc.configs.size import size_text

THIS = "this result"


def overview(run: SavedRun, page: Page) -> list[Part]:
    """Return the most important numbers."""
    report = run.report
    model, targeted = report["size"]["model"], report["size"]["targeted"]
    files = model["file_bytes"]
    items = [
        (
            "weight files",
            size_text(files["compressed"]),
            f"{percent_text(files['compressed'] / files['dense'])} of {size_text(files['dense'])}",
        )
    ]
    if report["layers"]:
        items.append(
            (
                "targeted matrices",
                percent_text(targeted["kept"]),
                f"{size_text(targeted['bits'] / 8)} of {size_text(targeted['dense_bits'] / 8)}"
                f"{_with_embedding(report)}",
            )
        )
    for name, entry in report["evaluation"]["perplexity"].items():
        ratio = entry["ratio"]
        dense = "" if ratio is None else f"{ratio:.3f} times the dense {score_text(entry['dense'])}"
        items.append((f"perplexity {name}", score_text(entry["compressed"]), dense))
    if rows := gate_rows(run):
        items.append(("gates", passed_text(rows), "thresholds of the recipe"))
    parts: list[Part] = [Facts(items)]
    if comparison := report["evaluation"]["baseline_comparison"]:
        parts.append(Text(f"Compared with plain quantization or pruning: {comparison}"))
    return parts


def warnings(run: SavedRun, page: Page) -> list[Part]:
    """Return what the run warned of."""
    evaluation = run.report["evaluation"]
    gap = evaluation.get("domain_gap")  # not in reports of all versions
    texts = dict.fromkeys([*run.report["warnings"], *([gap] if gap else [])])  # often among them
    found = [Text(text, warning=True) for text in texts]
    missing = (
        Text(
            f"{each['metric']} of the {each['model']} model was not measured: {each['reason']}",
            warning=True,
        )
        for each in evaluation["missing"]
    )
    return [*found, *missing]


def sizes(run: SavedRun, page: Page) -> list[Part]:
    """Return the sizes of the whole model and of the source."""
    size = run.report["size"]
    model, targeted, source = size["model"], size["targeted"], size["source"]
    rows = [_size_row("weight files", model["file_bytes"], size_text)]
    if targeted["dense_bits"]:
        both = {"dense": targeted["dense_bits"] // 8, "compressed": targeted["bits"] // 8}
        name = f"targeted matrices{_with_embedding(run.report)}"
        rows.append(_size_row(name, both, size_text))
    rows.append(_size_row("parameters", model["parameters"], "{:,}".format))
    parts = tables("Size", ["", "dense", "compressed", "kept"], rows)
    if source["quantized"]:
        parts.append(
            Text(
                f"The source file is itself quantized and takes {size_text(source['file_bytes'])}. "
                "Sizes above compare with the same model in the dtype of the recipe."
            )
        )
    return parts


def _with_embedding(report: Mapping[str, Any]) -> str:
    """Return a remark if the targeted matrices are more than those that `keep` is about."""
    outside = any(matrix.layer is None for matrix in matrices_of(report))
    return ", with the embedding" if outside else ""


def _size_row(name: str, both: Mapping[str, int], write: Any) -> list[str]:
    dense, compressed = both["dense"], both["compressed"]
    return [name, write(dense), write(compressed), percent_text(compressed / dense)]


def quality(run: SavedRun, page: Page) -> list[Part]:
    """Return perplexities, divergences, task scores and continuations."""
    evaluation = run.report["evaluation"]
    dtypes = dict.fromkeys(entry["dtype"] for entry in evaluation["perplexity"].values())
    parts = tables(
        f"Perplexity per token in {', '.join(dtypes)} ± standard error; lower is better",
        ["text", "dense", "compressed", "ratio", "tokens", "windows"],
        (
            [
                f"{name}, in domain" if p.get("in_domain") else name,
                *(_perplexity(p, model) for model in ("dense", "compressed")),
                "" if p["ratio"] is None else f"{p['ratio']:.3f}",
                f"{p['tokens']:,}",
                f"{p['windows']} of {p['window']}{', BOS each' if p['bos'] else ''}",
            ]
            for name, p in evaluation["perplexity"].items()
        ),
    )
    parts += divergences(evaluation.get("kl", {}))  # not in reports of all versions
    parts += _tasks(evaluation["tasks"], page)
    continued = evaluation.get("generations", [])
    if continued:
        rows = [[each["prompt"], each["dense"], each["compressed"]] for each in continued]
        head = ["prompt", "dense", "compressed"]
        parts.append(Table("Prompts continued by both models", head, rows, numbers=False))
    return parts


def _perplexity(entry: Mapping[str, Any], model: str) -> str:
    value = entry[model]
    if value is None:
        return ""
    error = entry.get("stderr", {}).get(model)  # not in reports of all versions
    return score_text(value, error)


def _tasks(tasks: Mapping[str, Any], page: Page) -> list[Part]:
    scores = [
        (f"{task} {metric}", entry)
        for task, metrics in tasks.items()
        for metric, entry in metrics.items()
    ]
    if not scores:
        return []
    rows = [
        [
            name,
            *(_score(entry, model) for model in ("dense", "compressed")),
            "" if entry["recovery"] is None else f"{entry['recovery']:.1f} %",
            "" if entry["documents"] is None else str(entry["documents"]),
        ]
        for name, entry in scores
    ]
    # Of one scale: perplexities of tasks would hide all differences of accuracies.
    fractions = [
        (name, _interval(e, "dense"), _interval(e, "compressed"))
        for name, e in scores
        if all(e[model] is None or 0 <= e[model] <= 1 for model in ("dense", "compressed"))
    ]
    plot = [(name, dense, compressed) for name, dense, compressed in fractions if compressed]
    title = "Scores of tasks with standard errors"
    figure = charts.pairs(page, title, "score", plot) if plot else None
    return [
        *tables(
            "Scores of tasks ± standard error",
            ["task", "dense", "compressed", "of dense", "documents"],
            rows,
        ),
        *figures((figure, "Tasks, with standard errors.") if figure else None),
    ]


def _score(entry: Mapping[str, Any], model: str) -> str:
    value, error = entry[model], entry["stderr"][model]
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _interval(entry: Mapping[str, Any], model: str) -> Interval | None:
    value, error = entry[model], entry["stderr"][model] or 0.0
    return None if value is None else Interval(value, error, error)


def baselines(run: SavedRun, page: Page) -> list[Part]:
    """Return the comparison with plain compression of the same matrices."""
    report = run.report
    evaluation = report["evaluation"]
    if not evaluation["baselines"]:
        return []
    texts = list(evaluation["perplexity"])
    rows = sorted(model_rows(run, THIS), key=lambda row: -row[1])
    dense = report["size"]["model"]["tensor_bytes"]["dense"]
    parts = tables(
        "Models by size, with the tensors of the whole model",
        ["", "tensors", "of dense", *(f"perplexity {text}" for text in texts)],
        (
            [name, size_text(size), percent_text(size / dense), *map(score_text, scores.values())]
            for name, size, scores, _ in rows
        ),
    )
    how = ((each["name"], each["how"]) for each in evaluation["baselines"])
    parts += figures(*(_plot(page, text, rows) for text in texts))
    return [*parts, Table("How the baselines are made", ["", "how"], [*how], numbers=False)]


Row = tuple[str, int, dict[str, float | None], str]
"""Name, bytes, perplexities by text (None if not finite), and kind of a model."""


def model_rows(run: SavedRun, name: str) -> Iterator[Row]:
    """Yield the dense model, the result under a name, and the baselines, as far as measured."""
    evaluation = run.report["evaluation"]
    sizes, texts = run.report["size"]["model"]["tensor_bytes"], evaluation["perplexity"]
    if all(entry["dense"] is not None for entry in texts.values()):
        yield "dense", sizes["dense"], {t: e["dense"] for t, e in texts.items()}, "dense"
    yield name, sizes["compressed"], {t: e["compressed"] for t, e in texts.items()}, "result"
    for each in evaluation["baselines"]:
        yield each["name"], each["bytes"], each["perplexity"], "baseline"


def points_of(rows: list[Row], text: str) -> list[Point]:
    """Return the points of models whose perplexity on a text is finite."""
    order = ("dense", "result", "baseline").index
    ordered = sorted(rows, key=lambda row: order(row[3]))
    found = ((name, size, scores.get(text), kind) for name, size, scores, kind in ordered)
    return [
        Point(name, size, score, kind) for name, size, score, kind in found if score is not None
    ]


def _plot(page: Page, text: str, rows: list[Row]) -> tuple[str, str]:
    caption = f"Size and perplexity on {text}; lower left is better. Baselines have empty markers."
    return charts.size_and_quality(page, text, points_of(rows, text)), caption


def speed(run: SavedRun, page: Page) -> list[Part]:
    """Return what `lrc bench --report` has measured."""
    speed = run.report["speed"]
    if speed is None:
        return []
    environment, settings = speed["environment"], speed["settings"]
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    results = [each for each in speed["results"] if not each["repeated"]]

    def cells(each: Mapping[str, Any]) -> Iterator[str]:
        yield "dense" if each["model"] == speed["against"] else THIS
        yield f"{each['mode']}, batch {each['batch']}, prompt {each['prompt']:,}"
        for phase in PHASES:
            found = each[phase]
            if found is None:
                yield from ("failed", "")
                continue
            yield f"{found['median']:,.1f} ({found['p10']:,.1f} to {found['p90']:,.1f})"
            verdict = {"equal": "within noise"}.get(found["verdict"], found["verdict"] or "")
            yield "" if found["ratio"] is None else f"{found['ratio']:.2f} {verdict}"
        yield size_text(each["peak_bytes"]) if each["peak_bytes"] is not None else ""

    head = [
        "model",
        "point",
        *(h for p in PHASES for h in (f"{p}, tokens/s", "of dense")),
        "memory",
    ]
    caption = "Speed: median (10th to 90th percentile) of the rounds"
    failed = {each["failed"]: None for each in results if each["failed"] is not None}
    return [
        Text(f"Measured by lrc bench on {environment['device']}{threads}, {settings['dtype']}."),
        *tables(caption, head, (list(cells(each)) for each in results)),
        *figures(*(_speed_figure(page, speed, results, phase) for phase in PHASES)),
        *(Text(f"Not measured: {reason}", warning=True) for reason in failed),
        *(Text(note) for note in speed["notes"]),
    ]


def _speed_figure(
    page: Page, speed: Mapping[str, Any], results: list[Any], phase: str
) -> tuple[str, str] | None:
    points: dict[str, dict[str, Interval]] = {}
    for each in results:
        if (found := each[phase]) is not None:
            place = f"{each['mode']}, batch {each['batch']}, {each['prompt']:,}"
            model = "dense" if each["model"] == speed["against"] else "compressed"
            median = found["median"]
            points.setdefault(place, {})[model] = Interval(
                median, max(0.0, median - found["p10"]), max(0.0, found["p90"] - median)
            )
    rows = [
        (place, models.get("dense"), models["compressed"])
        for place, models in points.items()
        if "compressed" in models
    ]
    if not rows:
        return None
    caption = f"{phase}: medians with their 10th and 90th percentiles."
    return charts.pairs(page, f"Speed of {phase}", f"{phase}, tokens per second", rows), caption
