"""Heat maps of decoder layers by projections."""

from collections.abc import Mapping, Sequence
from math import log10

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

from lrc.compressors.page.drawing import INK, LINE, SERIES, WIDTH, Page, shortened_label
from lrc.compressors.page.matrices import Grid
from lrc.compressors.page.number_text import short_text

FAINT, FULL = 0.06, 0.72
"""Opacity of the smallest and the largest value: text on it must be readable in both schemes."""
ROW, COLUMN = 0.145, 0.46
"""Inches of a cell, at least."""
USUAL_COLUMNS = 7
"""Number of columns that fit into the usual width."""


def heat_map(page: Page, title: str, unit: str, grid: Grid, *, logarithmic: bool = False) -> str:
    """Draw values by layer and projection; the color is stronger where they are larger.

    A page has its own background, so that a value is the opacity of one color, not a color map.
    """
    opacities = _opacities(grid.cells, logarithmic=logarithmic)
    with page.figure(*_size(grid)) as (figure, axes):
        for (row, column), value in grid.cells.items():
            place = (grid.columns.index(column), grid.rows.index(row))
            _cell(axes, place, SERIES[0], opacities[row, column])
            text = axes.text(*place, short_text(value), ha="center", va="center", fontsize=6)
            text.set_in_layout(False)  # measuring hundreds of texts would take seconds
        _frame(axes, grid)
        axes.set_title(f"{title}, {unit}" if unit else title)
        values = grid.cells.values()
        listed = f"{len(values)} values, {min(values):.4g} to {max(values):.4g} {unit}"
        return page.svg(figure, title, f"{listed}. The table of matrices lists all of them.")


def kinds_map(page: Page, title: str, grid: Grid, kinds: Sequence[str]) -> str:
    """Draw a kind for every place; values of `grid` are indices of `kinds`."""
    height, width = _size(grid)
    with page.figure(height + 0.17 * ((len(kinds) + 1) // 2), width) as (figure, axes):
        for (row, column), value in grid.cells.items():
            place = (grid.columns.index(column), grid.rows.index(row))
            _cell(axes, place, _color(int(value)), FULL)
        _frame(axes, grid)
        axes.set_title(title)
        handles = [
            Patch(facecolor=to_rgba(_color(index), FULL), label=shortened_label(kind, 30))
            for index, kind in enumerate(kinds)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=6.5)
        return page.svg(figure, title, "; ".join(kinds))


def _size(grid: Grid) -> tuple[float, float]:
    """Return height and width in inches."""
    extra = max(0, len(grid.columns) - USUAL_COLUMNS)
    return 1.0 + ROW * len(grid.rows), WIDTH + COLUMN * extra


def _color(kind: int) -> str:
    return SERIES[kind % len(SERIES)]


def _cell(axes: Axes, place: tuple[int, int], color: str, opacity: float) -> None:
    corner = (place[0] - 0.5, place[1] - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=to_rgba(color, opacity), linewidth=0))


def _frame(axes: Axes, grid: Grid) -> None:
    axes.set_xlim(-0.5, len(grid.columns) - 0.5)
    axes.set_ylim(len(grid.rows) - 0.5, -0.5)
    names = [shortened_label(name, 18) for name in grid.columns]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
    axes.set_yticks(range(len(grid.rows)), [str(row) for row in grid.rows], fontsize=6.5)
    axes.tick_params(length=0)
    axes.set_ylabel("decoder layer")
    for side in axes.spines.values():
        side.set_visible(True)
        side.set_color(LINE)
    axes.title.set_color(INK)


def _opacities(
    values: Mapping[tuple[int, str], float], *, logarithmic: bool
) -> dict[tuple[int, str], float]:
    positive = [value for value in values.values() if value > 0]
    if logarithmic and positive:
        low, high = log10(min(positive)), log10(max(positive))
        scaled = {key: (log10(v) if v > 0 else low) for key, v in values.items()}
    else:
        low, high = min(values.values()), max(values.values())
        scaled = dict(values)
    width = high - low
    return {
        key: FAINT + (FULL - FAINT) * ((value - low) / width if width else 0.5)
        for key, value in scaled.items()
    }
