"""The section about spectra: what truncation of a weight loses, and where it was cut."""

from dataclasses import dataclass
from itertools import groupby

from matplotlib.ticker import FuncFormatter

from lrc.compressors.page.drawing import MUTED, SERIES, Page
from lrc.compressors.page.matrices import labels, matrices_of
from lrc.compressors.page.parts import Part, Text, figures
from lrc.compressors.page.saved_runs import SavedRun

LEAST = 1e-6
"""Smallest error that is shown, if nothing is cut below it."""


@dataclass(frozen=True)
class _Spectrum:
    """One weight: fractions of its full rank, of the squared error lost there, and its cut."""

    projection: str
    ranks: list[float]
    lost: list[float]
    cut: float | None


def spectra(run: SavedRun, page: Page) -> list[Part]:
    """Return the spectra of all weights, one figure for every projection."""
    found = _spectra(run)
    if not found:
        return []
    groups = groupby(sorted(found, key=lambda each: each.projection), lambda each: each.projection)
    drawn = {name: [*members] for name, members in groups}
    order = dict.fromkeys(each.projection for each in found)
    return [
        Text(
            "One line for every weight: the fraction of the squared error of removing it that is "
            "left if it is truncated to a rank, in the metric of its method. The steeper a line, "
            "the easier its weight is to truncate. Points are the ranks that were chosen."
        ),
        *figures(
            *(
                (
                    _figure(page, name, drawn[name]),
                    f"{len(drawn[name])} matrices {name}.",
                )
                for name in order
            )
        ),
    ]


def _spectra(run: SavedRun) -> list[_Spectrum]:
    matrices = matrices_of(run.report)
    names, by_name = labels(matrices), {matrix.name: matrix for matrix in matrices}
    found = []
    for record in run.report.get("spectra") or []:
        matrix = by_name.get(record["weights"][0])
        if matrix is None:
            continue
        full = record["ranks"][-1]
        ranks = [rank / full for rank in record["ranks"]]
        cut = None if matrix.rank is None else matrix.rank / full
        found.append(_Spectrum(names[matrix.projection], ranks, record["lost"], cut))
    return found


def _figure(page: Page, name: str, members: list[_Spectrum]) -> str:
    title = f"Spectra of {name}"
    with page.figure(2.2) as (figure, axes):
        for each in members:
            shown = [(rank, lost) for rank, lost in zip(each.ranks, each.lost, strict=True) if lost]
            axes.plot(*zip(*shown, strict=True), color=MUTED, linewidth=0.5, alpha=0.5)
        cuts = [(each.cut, _at(each, each.cut)) for each in members if each.cut is not None]
        cuts = [(rank, lost) for rank, lost in cuts if lost > 0]
        if cuts:
            axes.plot(
                *zip(*cuts, strict=True), color=SERIES[0], marker="o", markersize=3, linestyle=""
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=min([LEAST, *(lost / 3 for _, lost in cuts)]))
        axes.set_xlim(0, 1)
        axes.set_xlabel("rank, of the full rank")
        axes.set_ylabel("error left")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.grid(True)
        axes.set_title(title)
        return page.svg(figure, title, f"{len(members)} weights, {len(cuts)} of them truncated.")


def _at(each: _Spectrum, rank: float) -> float:
    """Interpolate the logarithm of the error left at a rank."""
    places = zip(each.ranks, each.lost, strict=True)
    points = [(x, y) for x, y in places if y > 0]
    below = [point for point in points if point[0] <= rank]
    above = [point for point in points if point[0] > rank]
    if not below:
        return 0.0
    if not above:
        return float(below[-1][1])
    (x0, y0), (x1, y1) = below[-1], above[0]
    share = (rank - x0) / (x1 - x0)
    return float(y0 ** (1 - share) * y1**share)
