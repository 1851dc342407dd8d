"""Render the page of a run, or of several runs, as one self-contained HTML file."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lrc.compressors.page.comparison import compared
from lrc.compressors.page.drawing import COLORS, Page, standalone
from lrc.compressors.page.parts import Section
from lrc.compressors.page.saved_runs import AGAIN, SavedRun
from lrc.compressors.page.sections import sections_of
from lrc.compressors.page.sweep_parts import sweep_plots, sweep_sections
from lrc.configs.errors import CheckpointError


def render(runs: Sequence[SavedRun]) -> str:
    """Return the page of one run, or of the comparison of several runs.

    Raises
    ------
    CheckpointError
        If a report lacks keys that `lrc compress` writes.
    """
    page = Page()
    try:
        if len(runs) == 1:
            title = f"{_model(runs[0])}, compressed: {runs[0].name}"
            return _html(title, sections_of(runs[0], page))
        return _html(f"Comparison of {len(runs)} runs", compared(runs, page))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        names = ", ".join(run.name for run in runs)
        raise CheckpointError(
            f"{names}: the report is not as `lrc compress` writes it ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.200}); {AGAIN}",
            code="invalid-report",
        ) from error


def render_sweep(sweep: Mapping[str, Any]) -> tuple[str, str]:
    """Return the page of a sweep, and its first plot as an SVG file; empty without results.

    Parameters
    ----------
    sweep : mapping
        The content of ``sweep.json``.
    """
    page = Page()
    plots = sweep_plots(sweep, page)
    title = f"Sweep of {Path(sweep['recipe']).name}"
    return _html(title, sweep_sections(sweep, plots)), standalone(plots[0][0]) if plots else ""


def _model(run: SavedRun) -> str:
    path = str(run.report["recipe"]["model"]["path"])
    return Path(path).name.removesuffix(".gguf") or path


def _html(title: str, sections: Sequence[Section]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("lrc.compressors.page").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(template).render(title=title, sections=sections, colors=COLORS)
