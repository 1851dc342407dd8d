"""Pareto optimal runs, and the search for the smallest budget."""

import random
from typing import Any

import pytest

from lrc.compressors.sweep.bisection import smallest_keep
from lrc.compressors.sweep.outcome import pareto


def runs(*points: tuple[int, float], higher: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "name": str(number),
            "bytes": size,
            "metrics": {"m": {"value": value, "higher_is_better": higher}},
        }
        for number, (size, value) in enumerate(points)
    ]


def test_runs_that_another_beats_in_both_are_left_out() -> None:
    assert pareto(runs((100, 3.0), (200, 2.0), (300, 2.5), (400, 1.0)), "m") == ["0", "1", "3"]
    assert pareto(runs((100, 3.0), (200, 2.0), (300, 2.5), higher=True), "m") == ["0"]


def test_similar_sizes_count_as_equal() -> None:
    assert pareto(runs((1000, 3.0), (1004, 2.0)), "m") == ["1"]
    assert pareto(runs((1000, 3.0), (1006, 2.0)), "m") == ["0", "1"]
    assert pareto(runs((1000, 2.0), (1004, 2.0)), "m") == ["0", "1"]


def test_runs_without_the_metric_are_left_out() -> None:
    found = runs((100, 1.0), (50, 1.0))
    found[1]["metrics"] = {}
    assert pareto(found, "m") == ["0"]


@pytest.mark.parametrize("seed", range(20))
def test_the_search_ends_within_its_resolution(seed: int) -> None:
    threshold = random.Random(seed).uniform(0.02, 0.98)
    tried: list[float] = []

    def verdict(keep: float) -> str:
        tried.append(keep)
        return "met" if keep >= threshold else "missed"

    found = smallest_keep(verdict)  # type: ignore[arg-type]
    assert len(tried) == 6
    assert found.keep is not None
    assert threshold <= found.keep <= threshold + 1 / 64 + 1e-3
    assert found.not_met is None or found.not_met < threshold


def test_impossible_budgets_are_no_evaluations() -> None:
    verdicts: list[str] = []

    def verdict(keep: float) -> str:
        verdicts.append("infeasible" if keep < 0.4 else "met" if keep >= 0.45 else "missed")
        return verdicts[-1]

    found = smallest_keep(verdict)  # type: ignore[arg-type]
    assert sum(each != "infeasible" for each in verdicts) == 6
    assert found.keep == pytest.approx(0.45, abs=0.01)


def test_without_success_the_largest_miss_is_known() -> None:
    found = smallest_keep(lambda keep: "missed")
    assert found.keep is None
    assert found.not_met == pytest.approx(1 - 1 / 64, abs=1e-3)
