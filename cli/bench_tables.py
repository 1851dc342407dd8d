"""The results of `lrc bench` as tables."""

from itertools import groupby
from typing import Any

from rich.markup import escape

from lrc.cli.quality import OUT, new_table
from lrc.compressors.benchmark.results import PHASES, slower_models
from lrc.configs.size import size_text

REPEATED = "dense, repeated"
NAMED = 6
"""Slower measurements that are named per model; the others are counted."""


def print_benchmark(report: dict[str, Any]) -> None:
    """Print sizes and loading, one table for every point of the grid, and what is slower."""
    settings, environment = report["settings"], report["environment"]
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    OUT.print(f"{environment['device']}{threads}, {settings['dtype']}")
    _print_models(report)
    for _, group in groupby(report["results"], key=_place):
        _print_point(list(group), compared=report["against"] is not None)
    if noise := [each[phase] for each in report["noise"] for phase in PHASES if each[phase]]:
        OUT.print(f"noise: dense and dense, repeated differ by up to {max(noise):.1%}")
    for note in report["notes"]:
        OUT.print(f"[yellow]note[/]: {note}")
    for model in report["models"]:
        print_slow_forms(model["slow_forms"], f"in {escape(model['name'])}")
    print_slower_models(report)


def print_slower_models(report: dict[str, Any]) -> None:
    """Print one sentence for every model that is slower than dense in some measurement."""
    for each in slower_models(report):
        OUT.print(
            f"[yellow]slower than dense[/]: {escape(each.model)} in {len(each.places)} of "
            f"{each.compared} measurements: {'; '.join(each.places[:NAMED])}"
            f"{'; and others' if len(each.places) > NAMED else ''}"
        )


def print_slow_forms(forms: list[dict[str, Any]], where: str) -> None:
    """Print one line for each form without a fast path."""
    for each in forms:
        some = "1 layer" if each["layers"] == 1 else f"{each['layers']} layers, such as"
        OUT.print(
            f"[yellow]no fast path[/] {where}: {each['form']} ({some} {each['example']}): ", end=""
        )
        OUT.print(each["reason"], markup=False)


def _print_models(report: dict[str, Any]) -> None:
    table = new_table("", "model", "files", "weights", "resident", "load peak", "load s")
    for model in report["models"]:
        sizes = ("file_bytes", "weight_bytes", "resident_bytes", "load_peak_bytes")
        seconds = model["load_seconds"]
        table.add_row(
            _label(model["name"], dense=model["dense"]),
            *(size_text(model[key]) for key in sizes),
            "" if seconds is None else f"{seconds:.2f}",
        )
    OUT.print(table)


def _print_point(rows: list[dict[str, Any]], *, compared: bool) -> None:
    first = rows[0]
    title = (
        f"{first['mode']}, batch {first['batch']}, prompt {first['prompt']:,}, "
        f"{first['tokens']:,} new tokens"
    )
    ratio = ["of dense"] if compared else []
    columns = [c for phase in PHASES for c in (f"{phase} tokens/s", "10-90 %", *ratio)]
    table = new_table(title, "model", *columns, "peak")
    failed = []
    for number, row in enumerate(rows):
        name = REPEATED if row["repeated"] else _label(row["model"], dense=compared and not number)
        if row["failed"] is not None:
            failed.append((name, row["failed"]))
            cells = ["failed", *[""] * (len(columns) - 1)]
        else:
            cells = [cell for phase in PHASES for cell in _cells(row[phase], compared=compared)]
            if row["predicted_ratio"] is not None:
                cells[-1] += f" (predicted {row['predicted_ratio']:.2f}x)"
        table.add_row(name, *cells, size_text(row["peak_bytes"]) if row["peak_bytes"] else "")
    OUT.print(table)
    for name, reason in failed:
        OUT.print(f"[red]failed[/]: {name}: ", end="")
        OUT.print(reason, markup=False)


def _cells(speed: dict[str, Any], *, compared: bool) -> list[str]:
    """Return median, range and ratio of a phase."""
    spread = f"{_rate(speed['p10'])}-{_rate(speed['p90'])}"
    cells = [_rate(speed["median"]), spread]
    if compared:
        cells.append("" if speed["ratio"] is None else _ratio(speed["ratio"], speed["verdict"]))
    return cells


def _ratio(ratio: float, verdict: str | None) -> str:
    """Return the ratio, and whether it is slower: `0.87x slower`, `0.99x within noise`, `1.30x`."""
    words = {"slower": " [yellow]slower[/]", "equal": " within noise"}
    return f"{ratio:.2f}x{words.get(verdict or '', '')}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _label(name: str, *, dense: bool) -> str:
    return f"{name} (dense)" if dense else name


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["mode"], row["batch"], row["prompt"], row["tokens"]
