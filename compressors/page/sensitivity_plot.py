"""A figure of the predicted loss of matrices against their bits."""

from collections.abc import Mapping, Sequence

from lrc.compressors.page.drawing import INK, SERIES, Page, standalone
from lrc.compressors.planning.loss_curves import LossCurves, SizeLoss

OPACITY = 0.35
"""Of the lines, of which there are as many as matrices."""


def sensitivity_svg(curves: LossCurves, chosen: Mapping[str, float]) -> str:
    """Return an SVG file: one line per matrix in the colour of its projection.

    Parameters
    ----------
    curves : mapping of str to sequence of SizeLoss
    chosen : mapping of str to float
        Matrix -> bits per weight in the plan, which get a marker.
    """
    page, projections = Page(), list(dict.fromkeys(map(_projection, curves)))
    with page.figure(4.0 + 0.17 * ((len(projections) + 2) // 3), width=6.5) as (figure, axes):
        for name, sizes in curves.items():
            points = [size for size in sizes if size.nats > 0]  # the axis is logarithmic
            color = SERIES[projections.index(_projection(name)) % len(SERIES)]
            places = [size.bits for size in points], [size.nats for size in points]
            axes.plot(*places, color=color, linewidth=0.8, alpha=OPACITY)
            if (mark := _at(points, chosen.get(name))) is not None:
                axes.plot(mark.bits, mark.nats, "o", color=color, markersize=3)
        for number, projection in enumerate(projections):
            axes.plot([], [], color=SERIES[number % len(SERIES)], label=projection)
        axes.plot([], [], "o", color=INK, markersize=3, label="in the plan")
        axes.set_yscale("log")
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel("predicted loss increase, nats per token")
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0)
        described = f"{len(curves)} matrices; markers are the sizes in the plan"
        svg = page.svg(figure, "Predicted loss against bits per weight", described)
    return standalone(svg)


def _projection(name: str) -> str:
    return name.rpartition(".")[2]


def _at(points: Sequence[SizeLoss], bits: float | None) -> SizeLoss | None:
    """Return the point nearest to a size; None if there is none, or the matrix is dense."""
    if bits is None or not points or bits > 1.01 * points[-1].bits:
        return None
    return min(points, key=lambda size: abs(size.bits - bits))
