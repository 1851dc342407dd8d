"""Heat maps of decoder layers by projections."""

from collections.abc import Callable, Mapping, Sequence
from math import log10

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

from lrc.compressors.page.drawing import INK, LINE, SERIES, WIDTH, Page, fix_layout, shortened_label
from lrc.compressors.page.matrices import Grid
from lrc.compressors.page.number_text import short_text

FAINT, FULL = 0.06, 0.72
"""Opacity of the smallest and the largest value: text on it must be readable in both schemes."""
ROW, COLUMN = 0.145, 0.46
"""Inches of a cell, at least."""
DECADES = 1.0
"""Range of a logarithmic scale, at least."""
USUAL_COLUMNS = 7
"""Number of columns that fit into the usual width."""


def heat_map(page: Page, title: str, unit: str, grid: Grid, *, logarithmic: bool = False) -> str:
    """Draw values by layer and projection; the color is stronger where they are larger.

    A page has its own background, so that a value is the opacity of one color, not a color map.
    """
    opacities = _opacities(grid.cells, logarithmic=logarithmic)
    with page.figure(*_size(grid)) as (figure, axes):
        _draw_cells(axes, grid, lambda place: to_rgba(SERIES[0], opacities[place]))
        axes.set_title(f"{title}, {unit}" if unit else title)
        fix_layout(figure)  # measuring hundreds of texts would take seconds
        for place, value in grid.cells.items():
            text = short_text(value)
            axes.text(*_position(grid, place), text, ha="center", va="center", fontsize=6)
        values = grid.cells.values()
        listed = f"{len(values)} values, {min(values):.4g} to {max(values):.4g} {unit}"
        return page.svg(figure, title, f"{listed}. The table of matrices lists all of them.")


def kinds_map(page: Page, title: str, grid: Grid, kinds: Sequence[str]) -> str:
    """Draw a kind for every place; values of `grid` are indices of `kinds`."""
    height, width = _size(grid)
    with page.figure(height + 0.17 * ((len(kinds) + 1) // 2), width) as (figure, axes):
        _draw_cells(axes, grid, lambda place: to_rgba(_color(int(grid.cells[place])), FULL))
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


def _position(grid: Grid, place: tuple[int, str]) -> tuple[int, int]:
    """Return the coordinates of the centre of a cell."""
    return grid.columns.index(place[1]), grid.rows.index(place[0])


def _draw_cells(
    axes: Axes, grid: Grid, color: Callable[[tuple[int, str]], tuple[float, float, float, float]]
) -> None:
    corners = [_position(grid, place) for place in grid.cells]
    cells = [Rectangle((x - 0.5, y - 0.5), 1, 1) for x, y in corners]
    colors = [color(place) for place in grid.cells]
    axes.add_collection(PatchCollection(cells, facecolors=colors, linewidths=0), autolim=False)
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
    """Scale values between 0 and the largest, or over at least `DECADES` powers of ten.

    A narrower scale would make values look different that are nearly equal.
    """
    top = max(values.values())
    if top <= 0:
        return dict.fromkeys(values, FAINT)
    low = min((value for value in values.values() if value > 0), default=top)
    decades = max(DECADES, log10(top / low))

    def scaled(value: float) -> float:
        if not logarithmic:
            return value / top
        return max(0.0, 1 + log10(value / top) / decades) if value > 0 else 0.0

    return {key: FAINT + (FULL - FAINT) * scaled(value) for key, value in values.items()}
