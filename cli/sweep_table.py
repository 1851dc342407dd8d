"""The results of `lrc sweep` as tables."""

from pathlib import Path
from typing import Any

from rich.markup import escape

from lrc.cli.quality import OUT, new_table
from lrc.compressors.page.sweep_parts import metric_text
from lrc.configs.size import size_text

SHOWN = 6
"""Metrics in the table, so that it fits on a screen; all are on the page."""


def print_sweep(sweep: dict[str, Any], folder: Path) -> None:
    """Print the runs, largest first, what is Pareto optimal, and the result of a search."""
    metrics = list(sweep["pareto"])[:SHOWN]
    table = new_table("* Pareto optimal", "run", "weight files", "of dense", *metrics, "")
    measured = [run for run in sweep["runs"] if run["bytes"] is not None]
    for run in sorted(measured, key=lambda run: -run["bytes"]):
        best = [m for m in metrics if run["name"] in sweep["pareto"][m]]
        table.add_row(
            escape(run["name"]),
            size_text(run["bytes"]),
            f"{run['bytes'] / run['dense_bytes']:.1%}",
            *(metric_text(run["metrics"].get(m)) + (" *" if m in best else "") for m in metrics),
            "" if run["status"] == "finished" else run["status"],
        )
    if table.rows:
        OUT.print(table)
    for run in sweep["runs"]:
        if run["bytes"] is None:
            OUT.print(f"[red]failed[/]: {escape(run['name'])}: ", end="")
            OUT.print("; ".join(run["problems"]), markup=False)
    if sweep["target"] is not None:
        _print_target(sweep["target"])
    OUT.print(f"runs: {folder}   results: {folder}/sweep.json   page: {folder}/sweep.html")


def _print_target(target: dict[str, Any]) -> None:
    for each in target["found"]:
        where = ", ".join(f"{key}={value}" for key, value in each["values"].items())
        found = "none" if each["keep"] is None else f"{each['keep']:g} ({each['run']})"
        missed = "" if each["not_met"] is None else f"; missed at {each['not_met']:g}"
        label = f"{where}: " if where else ""
        OUT.print(f"{label}smallest keep with {target['gate']}: {found}{missed}", markup=False)
