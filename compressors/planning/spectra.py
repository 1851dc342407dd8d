"""Spectra of weights for the report: what truncation to a rank would lose."""

from typing import Any

from lrc.compressors.io.journal import Journal
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.rate_distortion import energies_file

FILE = "spectra.json"
STEPS = 16
"""Ranks of a spectrum in the report: multiples of this fraction of the full rank."""


def store_spectra(plan: Plan, journal: Journal) -> None:
    """Keep the spectra of a run in the journal, before its curves are deleted.

    Only allocators compute them, so that methods with uniform ranks have none.
    """
    if journal.has(FILE):
        return
    found = []
    for task in plan.tasks:
        file = energies_file(task.layer)
        key = {task.name: "energies"}
        energies = journal.read_tensors(file, key).get("energies") if journal.has(file) else None
        if energies is None or float(energies.sum()) <= 0:
            continue
        remaining = energies.double().flip(0).cumsum(0).flip(0) / energies.double().sum()
        full = len(energies)
        ranks = [round(full * step / STEPS) for step in range(STEPS + 1)]
        lost = [float(remaining[rank]) if rank < full else 0.0 for rank in ranks]
        found.append(
            {
                "weights": [weight.name for weight in task.weights],
                "ranks": ranks,
                "lost": [float(f"{value:.4g}") for value in lost],
            }
        )
    journal.write_json(FILE, found)


def stored_spectra(journal: Journal) -> list[dict[str, Any]]:
    """Return the spectra of a run: the fraction of squared error lost at some ranks."""
    found: list[dict[str, Any]] = journal.read_json(FILE) if journal.has(FILE) else []
    return found
