"""Configurations that an allocator can choose for a task, with their costs and losses."""

from collections.abc import Iterable, Iterator, Sequence
from math import lcm
from typing import NamedTuple

import torch

from lrc.compressors.layers import QuantizationArgs, WeightConfig
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.methods.size_families import components_of
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.solvers.linalg import numerical_rank

# Squared error of quantizing two factors, or values and their atoms, relative to that of quantizing
# the weight with the same parameters: the errors of both factors add up, and more of the numbers
# are large.
LOW_RANK_ERROR, VALUES_ERROR = 1.5, 1.2


class Candidate(NamedTuple):
    """One way to store the weights of a task."""

    config: WeightConfig
    cost: int
    """In the measure of the allocation."""
    loss: float
    """Weighted squared error; comparable between tasks."""


class Joint(NamedTuple):
    """Candidates of one or more tasks that are chosen together."""

    parts: tuple[Candidate, ...]
    """One per task."""
    cost: int
    loss: float


def joint_candidates(offers: Sequence[Sequence[Candidate]]) -> list[Joint]:
    """Return the choices that give several tasks the same scheme; for one task, all of its own.

    Parameters
    ----------
    offers : sequence of sequence of Candidate
        One sequence per task; if several, with at most one candidate per scheme.
    """
    if len(offers) == 1:
        return [Joint((only,), only.cost, only.loss) for only in offers[0]]
    by_scheme = [{c.config.quantization: c for c in offered} for offered in offers]
    common = [key for key in by_scheme[0] if all(key in other for other in by_scheme)]
    parts = [tuple(each[key] for each in by_scheme) for key in common]
    return [Joint(p, sum(c.cost for c in p), sum(c.loss for c in p)) for p in parts]


def schemes_for(
    task: LayerTask, schemes: Iterable[QuantizationArgs]
) -> list[QuantizationArgs | None]:
    """Return how the numbers of a task can be stored: unquantized, or as integers."""
    return [None, *(args for args in schemes if args.divides(task.shape[1]))]


def candidates_for(task: LayerTask, curve: Curve, allocation: Allocation) -> list[Candidate]:
    """Return the candidates of which no cheaper one has a smaller loss, the dense weights last.

    Costs increase and losses decrease strictly.
    """
    measure = allocation.measure
    dense = Candidate(WeightConfig(task.shape), task.dense_cost(measure), 0.0)
    if curve.note:
        return [dense]
    floor, cap = allocation.min_keep * dense.cost, allocation.max_relative_error * curve.total
    energies = curve.energies.double()
    lost = [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # at each rank
    found: list[Candidate] = []
    for args in schemes_for(task, allocation.quantization):
        error, limit = 0.0, dense.cost
        if args is not None:
            config = SizeSteps(task, "dense", args).config(1)
            error, limit = curve.quantization[str(args)], task.cost(config, measure)
            found.append(Candidate(config, limit, error))
        for types in allocation.types:
            if types in LOW_RANK_TYPES:
                steps = SizeSteps(task, types, args)
                for rank, cost in _ranks(steps, numerical_rank(energies), allocation, limit):
                    if lost[rank] <= allocation.max_relative_error * lost[0]:
                        loss = lost[rank] + LOW_RANK_ERROR * error
                        found.append(Candidate(steps.config(rank), cost, loss))
        for point in curve.points:
            if "+" in point.types and args is not None and args.row_multiple > 1:
                continue  # its rank is not a multiple of the group size
            components = components_of(point.types, point.sizes, pattern=task.pattern)
            config = task.with_components(components).quantized(args)
            loss = point.squared_error + VALUES_ERROR * error
            found.append(Candidate(config, task.cost(config, measure), loss))
    kept: list[Candidate] = []
    for one in sorted(found, key=lambda each: (each.cost, each.loss)):
        allowed = floor <= one.cost < dense.cost and one.loss <= cap
        if allowed and (not kept or (one.cost > kept[-1].cost and one.loss < kept[-1].loss)):
            kept.append(one)
    return [*kept, dense]


def _ranks(
    steps: SizeSteps, largest: int, allocation: Allocation, limit: int
) -> Iterator[tuple[int, int]]:
    """Yield ranks up to `largest` with costs from the floor of an allocation to below `limit`."""
    group = 1 if steps.args is None else steps.args.row_multiple
    multiple = lcm(allocation.rank_multiple, group)
    floor = allocation.min_keep * steps.task.dense_cost(allocation.measure)
    cost_of = steps.costs(allocation.measure)
    for rank in range(multiple, largest + 1, multiple):
        cost = cost_of(rank)
        if cost >= limit:
            return
        if cost >= floor:
            yield rank, cost


def tail_candidates(task: LayerTask, curve: Curve, allocation: Allocation) -> list[Candidate]:
    """Return the ranks that are cheaper than dense, the dense weights last.

    The loss of a rank is the largest singular value that it removes, normalized to [0, 1].
    """
    dense = Candidate(WeightConfig(task.shape), task.dense_cost(allocation.measure), -1.0)
    values = curve.energies.double().sqrt()
    low, high = values[-1], values[0]
    # If all values are equal, there is no tail to remove.
    normalized = (values - low) / (high - low) if high > low else torch.ones_like(values)
    losses = [*normalized.tolist(), -1.0]
    steps = SizeSteps(task, allocation.types[0])
    ranks = _ranks(steps, len(values), allocation, dense.cost)
    return [*(Candidate(steps.config(rank), cost, losses[rank]) for rank, cost in ranks), dense]
