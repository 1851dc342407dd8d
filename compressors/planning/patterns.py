"""Patterns of zeros in a plan: which shapes and shares have no size with the one that is asked."""

from collections.abc import Iterable
from math import ceil
from operator import itemgetter

from lrc.compressors.planning.weight_groups import WORDS, Measure, Unit


def refuse_shapes(where: str, units: Iterable[Unit], problems: list[str]) -> None:
    """Refuse units whose shape cannot have their pattern; `where` is the stage's place."""
    for unit in units:
        if unit.first.pattern is None:
            continue
        try:
            unit.sizes_at(1)
        except ValueError as error:
            problems.append(
                f"{where}.pattern: {unit.first.name}: {error}; list the layer under 'ignore' or "
                "take pattern: unstructured"
            )


def refuse_share(
    key: str, units: Iterable[Unit], keep: float, measure: Measure, problems: list[str]
) -> None:
    """Refuse a share of the cost that is too small for a pattern, the largest need first.

    Without a pattern a small matrix may stay dense for want of sizes. Under 2:4 a share below what
    every matrix needs would leave all of them dense without a word.

    Parameters
    ----------
    key : str
        Place of the share in the recipe.
    """
    needs = []
    for unit in units:
        dense, least = unit.dense_cost(measure), unit.step_cost(1, measure)
        if unit.first.pattern is not None and keep * dense < least < dense:
            needs.append((least / dense, unit.first))
    for need, m in sorted(needs, key=itemgetter(0), reverse=True):
        problems.append(
            f"{key}: must be at least {ceil(need * 1e4) / 1e4:g} of the {WORDS[measure]} for "
            f"{m.name} {list(m.shape)} with pattern {m.pattern}, got {keep:g}; raise keep or list "
            "the layer under 'ignore'"
        )
