"""Weights for several budgets of one checkpoint, as pivot rows and a refinement.

The smallest budget has the pivot rows of a product of some rank. Larger budgets add more of its
singular vectors, as two factors that can be cut at any rank. Pivot rows cannot be cut: they are a
matrix in fewer numbers than two factors have, because they do not tell one singular vector from
another. The factors of the refinement are 8-bit integers, which saves what pivot rows would have
saved. It holds small singular values, so that rounding it changes the weight little.
"""

from collections.abc import Sequence
from dataclasses import replace

from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.compressors.planning.allocators import lagrangian
from lrc.compressors.planning.candidates import Candidate
from lrc.compressors.planning.elastic import with_budgets
from lrc.compressors.planning.measures import Measure
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.sizes import largest_within
from lrc.compressors.planning.tasks import LayerTask

SCHEME = QuantizationArgs(8)
"""Integers of a refinement: one scale per row, so that both factors can be cut."""


def refined(config: WeightConfig, ranks: Sequence[int]) -> WeightConfig:
    """Return a configuration of pivot rows with a refinement.

    Parameters
    ----------
    config : WeightConfig
        Of the smallest budget.
    ranks : sequence of int
        Rank of the refinement at each budget, the largest first; all 0 for none.
    """
    if not any(ranks):
        return config
    added = ComponentConfig(LowRank.TYPE, {"rank": ranks[0]}, SCHEME, ranks=tuple(ranks))
    return replace(config, components=(*config.components, added))


def is_refined(allocation: Allocation) -> bool:
    """Return whether an allocation gives weights pivot rows with a refinement."""
    return bool(allocation.elastic) and allocation.types == (PivotedLowRank.TYPE,)


def elastic_config(
    task: LayerTask, separate: Sequence[WeightConfig], allocation: Allocation
) -> WeightConfig | None:
    """Return a configuration that costs at most as much at each budget as separate ones.

    Parameters
    ----------
    separate : sequence of WeightConfig
        One per budget, the largest first. With a refinement, the last one stays as it is.

    Returns
    -------
    WeightConfig or None
        None if the weight is dense at some budgets only.
    """
    if not is_refined(allocation) or len({config.compressed for config in separate}) > 1:
        return with_budgets(separate)
    measure, smallest = allocation.measure, separate[-1]
    if not smallest.compressed:
        return smallest
    ranks = [
        refinement_within(
            task,
            smallest,
            task.cost(config, measure),
            measure,
            multiple=allocation.rank_multiple,
        )
        for config in separate[:-1]
    ]
    return refined(smallest, [*ranks, 0])


def refinement_within(
    task: LayerTask, config: WeightConfig, cost: float, measure: Measure, *, multiple: int
) -> int:
    """Return the largest rank of a refinement with which a weight costs at most `cost`.

    Parameters
    ----------
    config : WeightConfig
        Of the smallest budget.
    multiple : int
        The rank is a multiple of it.
    """

    def cost_at(rank: int) -> int:
        return task.cost(refined(config, [rank]), measure)

    limit = min(cost, task.dense_cost(measure) - 1)
    largest = min(task.shape) - config.sizes["rank"]
    return largest_within(cost_at, limit, largest, multiple=multiple)


def refinements(
    task: LayerTask, smallest: Candidate, curve: Curve, measure: Measure, *, multiple: int
) -> list[Candidate]:
    """Return the candidates that add a refinement to the choice for the smallest budget.

    The first one adds nothing. Costs increase and losses decrease strictly; errors of rounding are
    neglected.
    """
    config = smallest.config
    if not config.compressed:
        return [smallest]
    most = refinement_within(task, config, task.dense_cost(measure), measure, multiple=multiple)
    lost = curve.energies.double().flip(0).cumsum(0).flip(0).tolist()
    found = [smallest]
    for rank in range(multiple, most + 1, multiple):
        each, whole = refined(config, [rank]), config.sizes["rank"] + rank
        loss = lost[whole] if whole < len(lost) else 0.0
        if loss < found[-1].loss:
            found.append(Candidate(each, task.cost(each, measure), loss))
    return found


def refined_choices(
    candidates: Sequence[Sequence[Candidate]],
    tasks: Sequence[LayerTask],
    curves: Sequence[Curve],
    budgets: Sequence[int],
    measure: Measure,
    *,
    multiple: int,
) -> list[tuple[WeightConfig, Candidate]]:
    """Choose the configurations of several weights for several budgets.

    The smallest budget has the allocation that it would have alone. Each larger one adds to the
    next smaller one what lowers the total loss most.

    Parameters
    ----------
    candidates : sequence of sequence of Candidate
        For the smallest budget, see `lagrangian`; one sequence per task.
    budgets : sequence of int
        Upper limits of the total cost, in descending order.

    Returns
    -------
    list of tuple
        For every task its configuration for all budgets, and the choice for the largest.

    Raises
    ------
    BudgetError
        If the cheapest candidates together exceed the smallest budget.
    """
    picked = lagrangian(candidates, budgets[-1])
    offers = [
        refinements(task, each[index], curve, measure, multiple=multiple)
        for task, each, curve, index in zip(tasks, candidates, curves, picked, strict=True)
    ]
    chosen = [[each[0]] for each in offers]
    for budget in reversed(budgets[:-1]):
        picked = lagrangian(offers, budget)
        offers = [each[index:] for each, index in zip(offers, picked, strict=True)]
        for row, each in zip(chosen, offers, strict=True):
            row.insert(0, each[0])
    return [(_for_all([candidate.config for candidate in row]), row[0]) for row in chosen]


def _for_all(configs: Sequence[WeightConfig]) -> WeightConfig:
    """Return the configuration for all budgets, given that for each of them."""
    smallest = configs[-1]
    if not smallest.compressed:
        return smallest
    base = smallest.sizes["rank"]
    return refined(smallest, [config.sizes["rank"] - base for config in configs])
