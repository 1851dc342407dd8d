"""Sections about slicing and training."""

from collections.abc import Mapping
from typing import Any

from lrc.compressors.page import charts
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.number_text import nats_text, seconds_text, size_text
from lrc.compressors.page.parts import Part, Text, figures, tables
from lrc.compressors.page.saved_runs import SavedRun

NATS = "nats per token"


def slices(run: SavedRun, page: Page) -> list[Part]:
    """Return what slicing stages have removed."""
    parts: list[Part] = []
    for record in run.report["slices"]:
        (before, after), (bytes_before, bytes_after) = record["parameters"], record["bytes"]
        rows = [
            ["parameters", f"{before:,}", f"{after:,}"],
            ["tensors", size_text(bytes_before), size_text(bytes_after)],
            *(_change(key, *values) for key, values in record["config"].items()),
        ]
        caption = f"Stage {record['stage']}, {record['method']}: before and after slicing"
        parts += tables(caption, ["", "before", "after"], rows)
        parts += _lost(page, record["facts"])
        for key, value in record["facts"].items():
            if isinstance(value, str | int | float) or (
                key not in record["config"] and _is_short(value)
            ):
                parts.append(Text(f"{key}: {value}"))
    return parts


def _lost(page: Page, facts: Mapping[str, Any]) -> list[Part]:
    """Return the fractions of the output energy that layers lose, where a method states them."""
    layers = [each for each in facts.get("layers", []) if isinstance(each, dict)]
    keys = [
        key
        for key in dict.fromkeys(key for each in layers for key in each)
        if key != "layer" and all(isinstance(each.get(key), float | int) for each in layers)
    ]
    figure = [
        (
            charts.by_layer(page, key, [(each["layer"], each[key]) for each in layers]),
            f"{key} by decoder layer.",
        )
        for key in keys
    ]
    return figures(*figure)


def _is_short(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64 and not any(isinstance(v, dict) for v in value)
    )


def _change(key: str, before: Any, after: Any) -> list[str]:
    return [key, *(str(v) if len(str(v)) <= 60 else f"{str(v)[:59]}…" for v in (before, after))]


def healing(run: SavedRun, page: Page) -> list[Part]:
    """Return what training has gained, by stage."""
    parts: list[Part] = []
    for record in run.report["training"]:
        rows = [
            ["divergence on held-out text before", f"{nats_text(record['before'])} {NATS}"],
            ["divergence after", f"{nats_text(record['after'])} {NATS}"],
            ["steps", f"{record['steps']:,}"],
            ["training tokens", f"{record['tokens']:,}"],
            ["trained numbers", f"{record['trainable']:,}"],
            ["time", seconds_text(record["seconds"])],
            ["result", "used" if record["kept"] else "not used: no step was better"],
        ]
        name = f"Stage {record['stage']}, {record['method']}"
        parts += tables(name, ["", "value"], rows)
        parts += figures(_losses(page, name, record), *_fits(page, name, record))
        parts += tables(
            f"{name}: divergence at each budget, {NATS}",
            ["keep", "before", "after"],
            (
                [f"{each['keep']:g}", nats_text(each["before"]), nats_text(each["after"])]
                for each in record.get("budgets") or []
            ),
        )
    return parts


def _losses(page: Page, name: str, record: Mapping[str, Any]) -> tuple[str, str] | None:
    losses = [(step, value) for step, value in record.get("losses") or [] if value is not None]
    if len(losses) < 2:
        return None
    title = f"{name}: divergence on held-out text by training step"
    return charts.training_losses(page, title, losses, record.get("best_step")), f"{title}."


def _fits(page: Page, name: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the errors of the fits of `block`, before and after training."""
    fits = [fit for layer in record.get("layers") or [] for fit in layer["fits"]]
    losses = [[value for _, value in fit["losses"] if value is not None] for fit in fits]
    known = [(each[0], min(each)) for each in losses if each]
    if len(known) < 2:
        return []
    title = f"{name}: relative error of the outputs before and after each fit"
    figure = charts.before_and_after(page, title, "relative error", known)
    return [(figure, f"{title}.")]
