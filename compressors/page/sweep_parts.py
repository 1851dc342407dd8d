"""The page of a sweep: a table of its runs, and plots of size against every metric."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lrc.compressors.page.drawing import INK, MARKERS, MUTED, SERIES, Page, shortened_label
from lrc.compressors.page.number_text import percent_text, score_text
from lrc.compressors.page.parts import Part, Section, Table, Text, figures, tables
from lrc.configs.size import MIB, size_text

ALONG = ("keep", "size", "bits")
"""Keys along which a line is drawn, of those that vary."""
Plot = tuple[str, str]
"""SVG and caption."""


def sweep_sections(sweep: Mapping[str, Any], plots: Sequence[Plot]) -> list[Section]:
    """Return the sections of a page; ones without content are left out."""
    found = [
        Section("runs", "Runs", _runs(sweep)),
        Section("target", "Target", _target(sweep)),
        Section("quality", "Size and quality", figures(*plots)),
        Section("problems", "Failed runs and missed gates", _problems(sweep)),
    ]
    return [section for section in found if section.parts]


def sweep_plots(sweep: Mapping[str, Any], page: Page) -> list[Plot]:
    """Draw size against every metric that at least two runs have, or that is the first."""
    metrics = list(sweep["pareto"])
    measured = [m for m in metrics if sum(m in run["metrics"] for run in sweep["runs"]) > 1]
    return [_plot(sweep, page, metric) for metric in measured or metrics[:1]]


def metric_text(entry: Mapping[str, Any] | None) -> str:
    """Format a measurement with its standard error; empty if there is none."""
    if entry is None:
        return ""
    value, error = entry["value"], entry["stderr"]
    if abs(value) >= 10:
        return score_text(value, error)
    return " ± ".join(f"{each:.4f}" for each in (value, error) if each is not None)


def _runs(sweep: Mapping[str, Any]) -> list[Part]:
    metrics = list(sweep["pareto"])
    runs = sorted(sweep["runs"], key=lambda run: (run["bytes"] is None, -(run["bytes"] or 0)))
    rows = [
        [
            run["name"],
            run["status"],
            "" if run["bytes"] is None else size_text(run["bytes"]),
            percent_text(run["bytes"] and run["bytes"] / run["dense_bytes"]),
            *(
                metric_text(run["metrics"].get(metric))
                + (" *" if run["name"] in sweep["pareto"][metric] else "")
                for metric in metrics
            ),
        ]
        for run in runs
    ]
    caption = "Runs, largest first; * Pareto optimal: none is as small and as good, and better"
    return tables(caption, ["run", "status", "weight files", "of dense", *metrics], rows)


def _target(sweep: Mapping[str, Any]) -> list[Part]:
    target = sweep["target"]
    if target is None:
        return []
    rows = [
        [
            ", ".join(f"{k}={v}" for k, v in each["values"].items()) or "recipe",
            "none" if each["keep"] is None else f"{each['keep']:g}",
            each["run"] or "",
            "" if each["not_met"] is None else f"{each['not_met']:g}",
        ]
        for each in target["found"]
    ]
    head = ["", "smallest keep", "run", "missed at"]
    return [Table(f"Smallest keep with {target['gate']}", head, rows)]


def _problems(sweep: Mapping[str, Any]) -> list[Part]:
    return [
        Text(f"{run['name']}: {problem}", warning=True)
        for run in sweep["runs"]
        for problem in run["problems"]
    ]


def _plot(sweep: Mapping[str, Any], page: Page, metric: str) -> Plot:
    optimal, runs = sweep["pareto"][metric], list(_with(sweep, metric))
    series: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        series.setdefault(_series(run["values"]), []).append(run)
    with page.figure(2.5 + 0.17 * ((len(series) + 2) // 2)) as (figure, axes):
        for number, (name, members) in enumerate(series.items()):
            members.sort(key=lambda run: run["bytes"])
            color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            places = [run["bytes"] / MIB for run in members]
            entries = [run["metrics"][metric] for run in members]
            values = [entry["value"] for entry in entries]
            label = shortened_label(name or "runs", 26)
            axes.plot(places, values, color=color, linewidth=0.9)
            axes.plot([], [], color=color, linewidth=0.9, marker=marker, label=label)
            for run, place, entry in zip(members, places, entries, strict=True):
                filled = color if run["name"] in optimal else "none"
                axes.errorbar(
                    place,
                    entry["value"],
                    entry["stderr"],
                    fmt=marker,
                    color=color,
                    markerfacecolor=filled,
                    elinewidth=0.8,
                )
        dense = {run["metrics"][metric]["dense"] for run in runs} - {None}
        for value in dense:
            axes.axhline(value, color=MUTED, linewidth=0.8, linestyle="--", label="dense")
        axes.margins(0.08, 0.12)
        axes.set_xlabel("weight files, MiB", color=INK)
        axes.set_ylabel(shortened_label(metric, 34))
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.0, handletextpad=0.4)
        listed = "; ".join(
            f"{run['name']}: {size_text(run['bytes'])}, {run['metrics'][metric]['value']:.4g}"
            for run in runs
        )
        svg = page.svg(figure, f"Size and {metric}", listed)
    return svg, f"Size and {metric}. Filled markers are Pareto optimal."


def _with(sweep: Mapping[str, Any], metric: str) -> Iterator[Mapping[str, Any]]:
    yield from (run for run in sweep["runs"] if metric in run["metrics"])


def _series(values: Mapping[str, str]) -> str:
    """Return the values of a run except the one along which a line is drawn."""
    along = next((key for key in ALONG if key in values), None)
    return ", ".join(f"{key}={value}" for key, value in values.items() if key != along)
