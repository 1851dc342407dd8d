"""Figures as SVG inside a page: colours that follow the page, text as text, no references."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from itertools import count
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that stand for CSS variables of the page, so that a figure follows its colour scheme.
INK, MUTED, LINE = "#010200", "#010201", "#010202"
SERIES = tuple(f"#0102{16 + index:02x}" for index in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    **{color: f"series-{index}" for index, color in enumerate(SERIES)},
}
COLORS = {
    "ink": "#1b1f24",
    "muted": "#5b6470",
    "line": "#cfd4da",
    "series-0": "#2f6fd0",
    "series-1": "#c2570c",
    "series-2": "#16803c",
    "series-3": "#8b3fc7",
    "series-4": "#b3166b",
    "series-5": "#0e7c86",
    "series-6": "#7a6100",
    "series-7": "#55606e",
}
"""CSS variable -> its value on a light page."""
WIDTH = 3.75
"""Inches of a figure: 360 pixels of a page, which fit on a phone."""
PIXELS_PER_POINT = 4 / 3
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names may contain dollar signs
    "svg.fonttype": "none",  # smaller than outlines; can be searched, selected and read aloud
    # Of the same widths as the first, with which the layout is calculated.
    "font.family": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.4,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "hatch.color": MUTED,
}


class Page:
    """Draws the figures of one page, whose element ids must differ."""

    def __init__(self) -> None:
        self._numbers = count(1)

    @contextmanager
    def figure(self, height: float, width: float = WIDTH) -> Iterator[tuple[Figure, Axes]]:
        """Yield an empty figure and its axes; sizes in inches."""
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(width, height), layout="constrained")
            axes = figure.add_subplot()
            axes.set_axisbelow(True)
            yield figure, axes

    def svg(self, figure: Figure, title: str, description: str) -> str:
        """Return a figure as an SVG element with a title and a description for screen readers.

        Call it inside the context of `figure`.
        """
        name = f"figure-{next(self._numbers)}"
        text = StringIO()
        with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that depend on nothing else
            figure.savefig(text, format="svg", metadata={"Date": None})
        width, height = (PIXELS_PER_POINT * 72 * inches for inches in figure.get_size_inches())
        body = _body(text.getvalue(), name)
        return (
            f'<svg role="img" aria-labelledby="{name}-title {name}-text" '
            f'width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width / PIXELS_PER_POINT:g} {height / PIXELS_PER_POINT:g}">'
            f'<title id="{name}-title">{escape(title)}</title>'
            f'<desc id="{name}-text">{escape(description)}</desc>{body}</svg>'
        )


def standalone(svg: str) -> str:
    """Return an SVG file, in the colours of a light page, of an element from `Page.svg`."""
    for name, color in COLORS.items():
        svg = svg.replace(f"var(--{name})", color)
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="DejaVu Sans, Verdana, sans-serif" '
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg.replace("<svg ", head, 1)}\n'


def fix_layout(figure: Figure) -> None:
    """Calculate the layout now; what is added later has to fit into the axes."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")


def _body(svg: str, name: str) -> str:
    """Return what an SVG file draws, in the colours of the page and with ids of its own."""
    _, _, rest = svg.partition("<svg ")
    body = rest.partition(">")[2].rpartition("</svg>")[0]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style .*?</style>", "", body, flags=re.DOTALL)  # would hold for the whole page
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    used = {*re.findall(r'href="#([^"]+)"', body), *re.findall(r"url\(#([^)]+)\)", body)}

    def identity(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in used else ""

    body = re.sub(r' id="([^"]*)"', identity, body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    body = re.sub(r"<[^>]*>", _rounded, body)
    body = re.sub(r" font-family: [^;\"]*;?", "", body)  # the style sheet of the page has it once
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    return re.sub(r"\s*\n\s*", " ", _without_plain_groups(body))


def _rounded(tag: re.Match[str]) -> str:
    """Cut coordinates after hundredths of a point, which cannot be seen."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])


def _without_plain_groups(svg: str) -> str:
    """Remove groups without attributes, which change nothing; their elements stay."""
    kept: list[bool] = []

    def tag(found: re.Match[str]) -> str:
        if found[0] == "</g>":
            return found[0] if kept.pop() else ""
        kept.append(found[0] != "<g>")
        return found[0] if kept[-1] else ""

    return re.sub(r"</g>|<g(?: [^>]*[^/])?>", tag, svg.replace("<g/>", ""))


def shortened_label(text: str, limit: int = 34) -> str:
    """Return a label that fits into a legend."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
