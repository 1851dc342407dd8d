"""Ranks for several budgets of one checkpoint, which is stored for the largest of them.

A budget takes the first columns and rows of the stored factors. So the rank of a weight must not
increase from a budget to the next smaller one, and a weight that is stored dense is dense at all
budgets.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from lrc.compressors.layers import WeightConfig
from lrc.compressors.planning.allocators import BudgetError, Priced, lagrangian


def with_budgets(configs: Sequence[WeightConfig]) -> WeightConfig | None:
    """Return the first configuration of a weight with the ranks of all.

    Parameters
    ----------
    configs : sequence of WeightConfig
        One per budget, the largest first. A rank that exceeds that of the budget before is lowered
        to it.

    Returns
    -------
    WeightConfig or None
        The dense configuration if all are dense; None if only some are.
    """
    stored = {config.compressed for config in configs}
    if len(stored) > 1:
        return None
    if stored == {False}:
        return configs[0]
    ranks = accumulate((config.sizes["rank"] for config in configs), min)
    (component,) = configs[0].components
    return replace(configs[0], components=(replace(component, ranks=tuple(ranks)),))


def nested_choices(
    candidates: Sequence[Sequence[Priced]], budgets: Sequence[int]
) -> list[list[int]]:
    """Choose candidates for several budgets, of which each can be cut from the one before.

    The total loss over all budgets is minimized, approximately: weights stay dense as in the
    separate optimum for one of the budgets, or none do. With each of these sets the other weights
    are allocated from the largest budget to the smallest.

    Parameters
    ----------
    candidates : sequence of sequence of Candidate
        One sequence per weight, with strictly increasing costs and the dense weight last.
    budgets : sequence of int
        Upper limits of the total cost, in descending order.

    Returns
    -------
    list of list of int
        For every budget the index of the chosen candidate of every weight. No index increases, and
        weights are dense at all budgets or at none.

    Raises
    ------
    BudgetError
        If the cheapest candidates together exceed a budget.
    """
    separate = [lagrangian(candidates, budget) for budget in budgets]
    dense = [len(each) - 1 for each in candidates]
    fixed = {row for row, last in enumerate(dense) if last == 0}
    sets = [{row for row, index in enumerate(each) if index == dense[row]} for each in separate]
    best: tuple[float, list[list[int]]] | None = None
    for kept in [fixed, *sets]:
        try:
            choices = _nested(candidates, budgets, kept)
        except BudgetError:
            continue
        loss = sum(candidates[row][i].loss for each in choices for row, i in enumerate(each))
        if best is None or loss < best[0]:
            best = loss, choices
    assert best is not None  # without dense weights every budget can be met
    return best[1]


def _nested(
    candidates: Sequence[Sequence[Priced]], budgets: Sequence[int], kept: set[int]
) -> list[list[int]]:
    """Return the choices for every budget if the weights in `kept`, and no others, stay dense."""
    offers = [each[-1:] if row in kept else each[:-1] for row, each in enumerate(candidates)]
    first = [len(each) - 1 if row in kept else 0 for row, each in enumerate(candidates)]
    choices = []
    for budget in budgets:
        picked = lagrangian(offers, budget)
        offers = [each[: index + 1] for each, index in zip(offers, picked, strict=True)]
        choices.append([start + index for start, index in zip(first, picked, strict=True)])
    return choices
