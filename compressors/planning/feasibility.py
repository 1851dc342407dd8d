"""The smallest budget that a stage can meet, and the problem of one below it."""

from collections.abc import Sequence
from math import ceil, lcm

from lrc.compressors.methods.base import LOW_RANK_TYPES, FixedSizeMethod
from lrc.compressors.methods.size_families import components_of
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.candidates import schemes_for
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.rate_distortion import size_families
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.errors import Problem
from lrc.configs.size import least_text, parse_size, unit_of


def cheapest(tasks: Sequence[LayerTask], allocation: Allocation) -> int:
    """Return the lowest total cost that tasks of one stage can have under its floors.

    Most tasks differ in their names only: there can be thousands of experts.
    """
    alike: dict[tuple[tuple[int, int], bool, int, bool], list[LayerTask]] = {}
    for task in tasks:
        key = task.shape, task.config.bias, len(task.weights), task.source_bias
        alike.setdefault(key, []).append(task)
    return sum(len(group) * _cheapest(group[0], allocation) for group in alike.values())


def _cheapest(task: LayerTask, allocation: Allocation) -> int:
    measure = allocation.measure
    floor = allocation.min_keep * task.dense_cost(measure)
    costs = [task.dense_cost(measure)]
    for args in schemes_for(task, allocation.quantization):
        group = 1 if args is None else args.row_multiple
        configs = [] if args is None else [SizeSteps(task, "dense", args).config(1)]
        for types in allocation.types:
            if types in LOW_RANK_TYPES or isinstance(METHODS[task.method], FixedSizeMethod):
                steps = SizeSteps(task, types, args, min(allocation.ratios))
                multiple = lcm(allocation.rank_multiple, group)
                costs.append(
                    steps.cheapest(measure, multiple=multiple, min_keep=allocation.min_keep)
                )
            elif not ("+" in types and group > 1):
                smallest = [
                    sizes[-1] for _, sizes in size_families(task, types, allocation) if sizes
                ]
                found = [task.with_components(components_of(types, each)) for each in smallest]
                configs += [config.quantized(args) for config in found]
        each_cost = [task.cost(config, measure) for config in configs]
        costs += [cost for cost in each_cost if cost >= floor]
    return min(costs)


def unreachable(allocation: Allocation, smallest: int) -> Problem:
    """Return the problem of a budget below `smallest`, the cheapest cost of the pending tasks."""
    remedies, key = [], allocation.key
    if allocation.rank_multiple > 1:
        remedies.append(f"lower 'rank_multiple' ({allocation.rank_multiple})")
    if allocation.min_keep > 0:
        remedies.append(f"lower 'min_keep' ({allocation.min_keep:g})")
    if allocation.max_relative_error < 1:
        remedies.append(f"raise 'max_relative_error' ({allocation.max_relative_error:g})")
    if allocation.overrides:
        remedies.append("lower the budgets of 'overrides'")
    missing = smallest - allocation.budget
    if allocation.size is not None:
        got = allocation.size
        least = least_text(parse_size(got) + ceil(missing / 8), unit_of(got))
    else:
        assert allocation.keep is not None
        got = f"{allocation.keep:g}"
        fraction = (int(allocation.keep * allocation.total) + missing) / allocation.total
        least = f"{ceil(fraction * 1e4) / 1e4:g} of the {allocation.measure.words}"
    fixed = " in addition to what the overrides fix" if allocation.overrides else ""
    multiple = (
        " (ranks are also multiples of the group_size of a later 'quantize' stage)"
        if allocation.group_multiple > 1
        else ""
    )
    return Problem(
        "infeasible-budget",
        f"stages[{allocation.stage}].decompose.{key}",
        f"must be at least {least}, the cost of the cheapest candidates{fixed}, got {got}; "
        f"{', '.join([f'raise {key}', *remedies])}{multiple}",
    )
