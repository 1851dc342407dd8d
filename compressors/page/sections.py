"""The sections of the page of one run, in order; one without content is left out."""

from collections.abc import Callable

from lrc.compressors.page import (
    gate_parts,
    matrix_parts,
    quality_parts,
    run_parts,
    spectrum_parts,
    stage_parts,
)
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.parts import Part, Section
from lrc.compressors.page.saved_runs import SavedRun

SECTIONS: dict[str, tuple[str, Callable[[SavedRun, Page], list[Part]]]] = {
    "overview": ("Overview", quality_parts.overview),
    "warnings": ("Warnings", quality_parts.warnings),
    "size": ("Size", quality_parts.sizes),
    "quality": ("Quality", quality_parts.quality),
    "gates": ("Gates", gate_parts.gates),
    "baselines": ("Comparison with baselines", quality_parts.baselines),
    "speed": ("Speed", quality_parts.speed),
    "latency": ("Predicted times", matrix_parts.latency),
    "bytes": ("Where the bytes go", matrix_parts.bytes_by_place),
    "matrices": ("Rank, bits and predicted loss", matrix_parts.matrices),
    "spectra": ("Spectra", spectrum_parts.spectra),
    "profile": ("Predicted and measured loss", matrix_parts.profile),
    "slices": ("Slicing", stage_parts.slices),
    "healing": ("Healing", stage_parts.healing),
    "timing": ("Time and memory", run_parts.timings),
    "calibration": ("Calibration", run_parts.calibration),
    "recipe": ("Recipe", run_parts.recipe),
    "environment": ("Environment", run_parts.environment),
    "missing": ("Not measured", run_parts.missing),
}
"""Id in the page -> heading, and the function that returns its content."""


def sections_of(run: SavedRun, page: Page) -> list[Section]:
    """Return the sections of a run that have content."""
    found = [Section(key, title, parts(run, page)) for key, (title, parts) in SECTIONS.items()]
    return [section for section in found if section.parts]
