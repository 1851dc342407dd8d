"""Sections about slicing and training."""

from collections.abc import Iterator, Mapping
from typing import Any

from lrc.compressors.page import charts
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.number_text import nats_text, seconds_text
from lrc.compressors.page.parts import Part, figures, tables
from lrc.compressors.page.saved_runs import SavedRun
from lrc.configs.size import size_text

NATS = "nats per token"
MEANINGS = {
    "lost_mlp": "MLP, fraction of energy lost",
    "lost_values": "values, fraction of energy lost",
    "lost_scores": "scores, fraction of variance lost",
    "influence": "influence",
}
"""Facts of slicing methods, as the page names them; others have their own names."""
BY_LAYER = ("influence",)
"""Facts that are lists of one number for every layer."""
MOST = 64
"""Numbers of a list that a table shows."""


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
        name = f"Stage {record['stage']}, {record['method']}"
        parts += tables(f"{name}: before and after slicing", ["", "before", "after"], rows)
        parts += figures(*_facts_by_layer(page, record["facts"]))
        parts += tables(
            f"{name}: decisions",
            ["", "value"],
            (
                [MEANINGS.get(key, key), _fact_text(value)]
                for key, value in record["facts"].items()
                if key not in record["config"] and key not in BY_LAYER and _is_short(value)
            ),
        )
    return parts


def _facts_by_layer(page: Page, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield figures of what a method states about every layer."""
    records = [each for each in facts.get("layers", []) if isinstance(each, dict)]
    series = {
        key: [(each["layer"], each[key]) for each in records if isinstance(each.get(key), float)]
        for key in dict.fromkeys(key for each in records for key in each)
    }
    series |= {key: [*enumerate(facts[key])] for key in BY_LAYER if key in facts}
    for key, values in series.items():
        if len(values) > 1:
            title = MEANINGS.get(key, key)
            yield charts.by_layer(page, title, values), f"{title[:1].upper()}{title[1:]}, by layer."


def _is_short(value: Any) -> bool:
    """Return whether a fact is a word, a number, or a short list of numbers."""
    if isinstance(value, list):
        return len(value) <= MOST and all(isinstance(each, int | float) for each in value)
    return isinstance(value, str | int | float)


def _fact_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_fact_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _change(key: str, before: Any, after: Any) -> list[str]:
    return [key, *(str(v) if len(str(v)) <= 60 else f"{str(v)[:59]}…" for v in (before, after))]


def healing(run: SavedRun, page: Page) -> list[Part]:
    """Return what training has gained, by stage."""
    parts: list[Part] = []
    for record in run.report["training"]:
        rows = [
            ["divergence on held-out text before", f"{nats_text(record['before'])} {NATS}"],
            ["divergence after", f"{nats_text(record['after'])} {NATS}"],
            *(
                [f"cross entropy {when}", f"{nats_text(record['cross_entropy'][when])} {NATS}"]
                for when in ("before", "after")
                if "cross_entropy" in record
            ),
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
    measured = "loss (divergence and cross entropy)" if "cross_entropy" in record else "divergence"
    title = f"{name}: {measured} on held-out text by training step"
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
