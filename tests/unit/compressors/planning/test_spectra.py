"""Spectra in a report are those of the curves that ranks are chosen from."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lrc.compressors.io.journal import Journal
from lrc.compressors.page.spectrum_parts import _at, _Spectrum
from lrc.compressors.planning.rate_distortion import energies_file
from lrc.compressors.planning.spectra import STEPS, store_spectra, stored_spectra


def task(name: str, layer: int) -> Any:
    return SimpleNamespace(name=name, layer=layer, weights=(SimpleNamespace(name=name),))


def test_the_error_left_at_a_rank_is_the_sum_of_smaller_energies(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    energies = torch.rand(40, dtype=torch.float64).sort(descending=True).values
    curves = {"low-rank": energies, "fixed-size": torch.zeros(40)}
    journal.write_tensors(energies_file(0), curves, {})
    plan: Any = SimpleNamespace(
        tasks=[task("low-rank", 0), task("fixed-size", 0), task("uniform", 0), task("other", 1)]
    )
    store_spectra(plan, journal)
    (found,) = stored_spectra(journal)
    assert found["weights"] == ["low-rank"]
    assert (found["ranks"][0], found["ranks"][-1], len(found["ranks"])) == (0, 40, STEPS + 1)
    expected = [float(energies[rank:].sum() / energies.sum()) for rank in found["ranks"]]
    assert found["lost"] == pytest.approx(expected, rel=5e-4)
    journal.forget(energies_file(0))
    store_spectra(plan, journal)  # a resumed run, whose curves are gone
    assert stored_spectra(journal) == [found]


def test_points_lie_on_the_lines_of_a_logarithmic_plot() -> None:
    line = _Spectrum("q_proj", [0.0, 0.5, 1.0], [1.0, 1e-4, 0.0], 0.25)
    assert _at(line, 0.25) == pytest.approx(1e-2)
    assert _at(line, 0.5) == pytest.approx(1e-4)
    assert _at(line, 0.75) == pytest.approx(1e-4)  # zero cannot be drawn
