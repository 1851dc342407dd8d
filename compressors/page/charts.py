"""Figures of sizes, scores, losses and times."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lrc.compressors.page.drawing import (
    INK,
    LINE,
    MARKERS,
    MUTED,
    SERIES,
    Page,
    shortened_label,
)
from lrc.compressors.page.number_text import percent_text
from lrc.configs.size import MIB, size_text

WIDE_RANGE = 5.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A model in a plot of size and quality."""

    label: str
    bytes: int
    score: float
    kind: str
    """``dense``, ``result`` or ``baseline``."""


def size_and_quality(page: Page, text: str, points: Sequence[Point]) -> str:
    """Plot perplexity on one text against size; smaller and lower is better."""
    rows = (len(points) + 1) // 2
    with page.figure(2.5 + 0.17 * rows) as (figure, axes):
        compressed = [point for point in points if point.kind != "dense"]
        for point in points:
            dense = point.kind == "dense"
            number = 0 if dense else compressed.index(point)
            color = INK if dense else SERIES[number % len(SERIES)]
            axes.plot(
                point.bytes / MIB,
                point.score,
                linestyle="",
                marker=MARKERS[number % len(MARKERS)],
                markersize=7 if point.kind == "result" else 5.5,
                markerfacecolor="none" if point.kind == "baseline" else color,
                markeredgecolor=color,
                label=shortened_label(point.label, 26),
                clip_on=False,
            )
        scores = [point.score for point in points]
        if max(scores) > WIDE_RANGE * min(scores):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, scores)
        axes.margins(0.08, 0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel("tensors of the model, MiB")
        axes.set_ylabel(f"perplexity, {shortened_label(text, 24)}")
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.0, handletextpad=0.3)
        listed = "; ".join(f"{p.label}: {size_text(p.bytes)}, {p.score:.4g}" for p in points)
        return page.svg(figure, f"Size and perplexity on {text}", listed)


@dataclass(frozen=True)
class Bar:
    """A part of the model before and after compression."""

    label: str
    dense: float
    stored: float


def bytes_by_part(page: Page, title: str, bars: Sequence[Bar]) -> str:
    """Draw horizontal bars of the bytes of parts: stored, and in the dense model."""
    with page.figure(0.75 + 0.2 * len(bars)) as (figure, axes):
        places = range(len(bars))
        axes.barh(places, [b.dense / MIB for b in bars], color=LINE, height=0.7, label="dense")
        axes.barh(
            places, [b.stored / MIB for b in bars], color=SERIES[0], height=0.7, label="compressed"
        )
        for place, bar in zip(places, bars, strict=True):
            kept = percent_text(bar.stored / bar.dense) if bar.dense else ""
            axes.annotate(
                kept,
                (max(bar.dense, bar.stored) / MIB, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(places, [shortened_label(bar.label, 24) for bar in bars])
        axes.invert_yaxis()
        axes.margins(x=0.2, y=0.02)
        axes.set_xlabel("MiB")
        figure.legend(loc="outside lower center", ncols=2)
        listed = "; ".join(
            f"{b.label}: {size_text(b.dense)} to {size_text(b.stored)}" for b in bars
        )
        return page.svg(figure, title, listed)


def bytes_by_layer(page: Page, layers: Sequence[int], bars: Sequence[Bar]) -> str:
    """Draw vertical bars of the bytes of the targeted matrices in every decoder layer."""
    with page.figure(2.2) as (figure, axes):
        axes.bar(layers, [b.dense / MIB for b in bars], color=LINE, label="dense")
        axes.bar(layers, [b.stored / MIB for b in bars], color=SERIES[0], label="compressed")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("MiB")
        figure.legend(loc="outside lower center", ncols=2)
        stored = [bar.stored for bar in bars]
        listed = f"{len(bars)} layers, {size_text(min(stored))} to {size_text(max(stored))} each"
        return page.svg(figure, "Bytes of the targeted matrices by layer", listed)


@dataclass(frozen=True)
class Interval:
    """A value with its uncertainty: distances to the ends of the interval."""

    value: float
    below: float = 0.0
    above: float = 0.0


def pairs(
    page: Page, title: str, unit: str, rows: Sequence[tuple[str, Interval | None, Interval]]
) -> str:
    """Draw values of the dense and the compressed model with error bars, one row each."""
    with page.figure(0.8 + 0.3 * len(rows)) as (figure, axes):
        series = ([dense for _, dense, _ in rows], [compressed for *_, compressed in rows])
        for index, (label, color) in enumerate((("dense", INK), ("compressed", SERIES[0]))):
            known = [(place, each) for place, each in enumerate(series[index]) if each is not None]
            if known:
                axes.errorbar(
                    [each.value for _, each in known],
                    [place + 0.16 * (2 * index - 1) for place, _ in known],
                    xerr=[[e.below for _, e in known], [e.above for _, e in known]],
                    fmt=MARKERS[index],
                    color=color,
                    markersize=4,
                    elinewidth=0.9,
                    capsize=2,
                    label=label,
                )
        axes.set_yticks(range(len(rows)), [shortened_label(name, 30) for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(unit)
        axes.grid(True, axis="x")
        figure.legend(loc="outside lower center", ncols=2)
        listed = "; ".join(
            f"{name}: {'' if dense is None else f'dense {dense.value:.4g}, '}"
            f"compressed {compressed.value:.4g}"
            for name, dense, compressed in rows
        )
        return page.svg(figure, title, listed)


def training_losses(
    page: Page, title: str, losses: Sequence[tuple[int, float]], best: int | None
) -> str:
    """Plot the divergence on held-out text by training step."""
    with page.figure(2.2) as (figure, axes):
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color=SERIES[0], marker="o", markersize=3, linewidth=1.2)
        for step, value in losses:
            if step == best:
                axes.plot(
                    step,
                    value,
                    marker="o",
                    markersize=8,
                    markerfacecolor="none",
                    markeredgecolor=INK,
                    linestyle="",
                    label=f"used: step {step}",
                )
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        _from_zero(axes, values)
        axes.set_xlabel("training step")
        axes.set_ylabel("divergence, nats per token")
        axes.grid(True)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center")
        listed = "; ".join(f"step {step}: {value:.4g}" for step, value in losses)
        return page.svg(figure, title, listed)


def by_layer(page: Page, title: str, values: Sequence[tuple[int, float]]) -> str:
    """Draw vertical bars of a value of every decoder layer."""
    with page.figure(2.0) as (figure, axes):
        layers, heights = zip(*values, strict=True)
        axes.bar(layers, heights, color=SERIES[0])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel(title)
        axes.grid(True, axis="y")
        return page.svg(
            figure, f"{title} by decoder layer", f"{min(heights):.4g} to {max(heights):.4g}"
        )


def before_and_after(
    page: Page, title: str, unit: str, values: Sequence[tuple[float, float]]
) -> str:
    """Plot a loss of every layer before and after training."""
    with page.figure(2.2) as (figure, axes):
        for index, (label, color) in enumerate((("before", INK), ("after", SERIES[0]))):
            axes.plot(
                range(len(values)),
                [pair[index] for pair in values],
                color=color,
                marker=MARKERS[index],
                markersize=3,
                linewidth=1.0,
                label=label,
            )
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        _from_zero(axes, [value for pair in values for value in pair])
        axes.set_xlabel("fit, in the order of the layers")
        axes.set_ylabel(unit)
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=2)
        listed = "; ".join(f"{before:.4g} to {after:.4g}" for before, after in values)
        return page.svg(figure, title, listed)


def predicted_and_measured(
    page: Page, title: str, unit: str, groups: Sequence[tuple[str, Sequence[tuple[float, float]]]]
) -> str:
    """Plot measured divergence against prediction, logarithmic, one marker per projection."""
    numbers = [pair for _, values in groups for pair in values]
    with page.figure(3.1 + 0.17 * ((len(groups) + 3) // 4)) as (figure, axes):
        for index, (label, values) in enumerate(groups):
            axes.plot(
                [predicted for predicted, _ in values],
                [measured for _, measured in values],
                linestyle="",
                marker=MARKERS[index % len(MARKERS)],
                markersize=3.5,
                markerfacecolor="none",
                markeredgewidth=0.8,
                markeredgecolor=SERIES[index % len(SERIES)],
                label=shortened_label(label, 16),
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes.xaxis, [predicted for predicted, _ in numbers])
        _plain_ticks(axes.yaxis, [measured for _, measured in numbers])
        if unit == "nats per token":
            ends = [min(map(min, numbers)), max(map(max, numbers))]
            axes.plot(ends, ends, color=MUTED, linewidth=0.8, linestyle="--", label="equal")
        axes.set_xlabel(f"predicted, {unit}")
        axes.set_ylabel("measured, nats per token")
        axes.grid(True)
        figure.legend(
            loc="outside lower center", ncols=4, columnspacing=0.8, handletextpad=0.2, fontsize=6.5
        )
        listed = f"{len(numbers)} matrices"
        return page.svg(figure, title, listed)


def durations(page: Page, rows: Sequence[tuple[str, float]]) -> str:
    """Draw horizontal bars of the wall time of the phases."""
    with page.figure(0.6 + 0.2 * len(rows)) as (figure, axes):
        places = range(len(rows))
        axes.barh(places, [seconds for _, seconds in rows], color=SERIES[0], height=0.7)
        axes.set_yticks(places, [shortened_label(name, 30) for name, _ in rows])
        axes.invert_yaxis()
        axes.margins(y=0.02)
        axes.set_xlabel("seconds")
        listed = "; ".join(f"{name}: {seconds:.1f} s" for name, seconds in rows)
        return page.svg(figure, "Wall time of the phases", listed)


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    """Start the vertical axis at zero, and leave space for markers at the top."""
    axes.set_ylim(0, 1.08 * max(values) or 1.0)


def _plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Give a logarithmic axis a few ticks that are plain numbers."""
    decades = log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
