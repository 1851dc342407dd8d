"""The allocation ``uniform``: every weight keeps the same fraction of its cost."""

from dataclasses import replace
from math import ceil

from lrc.compressors.methods.size_families import coarse
from lrc.compressors.planning.measures import Measure
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.refinements import elastic_config
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask


def uniform(tasks: list[LayerTask], allocation: Allocation, problems: Problems) -> list[LayerTask]:
    """Give every task the same fraction of its cost, of what overrides leave of the budget.

    Ranks are rounded down. Tasks that are too small for the fraction stay dense, and the others
    share what remains. If no task can become smaller, all are returned dense. Where there are only
    a few sizes, as with pattern n:8, some tasks get the next larger one, see `_spread`.
    """
    where, measure = f"stages[{allocation.stage}].decompose", allocation.measure
    multiple, floor = allocation.rank_multiple, allocation.min_keep
    keep = None if allocation.overrides else allocation.keep
    if keep is not None:
        check_pattern_fraction(f"{where}.{allocation.key}", tasks, keep, measure, problems)
    fraction = _even_fraction(tasks, allocation, keep)
    if keep is not None and fraction <= 0:
        return [_without_budget(task, keep, measure, multiple) for task in tasks]
    if fraction <= (floor if keep is None else 0):
        key = allocation.key
        problems.add(
            "infeasible-budget",
            f"{where}.{key}",
            f"leaves every weight the same fraction {max(fraction, 0):.4g}, with 'min_keep' "
            f"{floor:g} and 'rank_multiple' {multiple}; raise {key}, or use allocation: lagrangian",
        )
        return tasks
    decided = []
    for task in tasks:
        chosen = within(task, fraction, measure, multiple, stated=keep)
        cost = task.cost(chosen.config, measure)
        if chosen.config.compressed and cost < floor * task.dense_cost(measure):
            between = f"that keeps between {floor:g} and {fraction:g}"
            problems.add(
                "infeasible-budget",
                f"{where}.min_keep",
                f"{task.name} {list(task.shape)} has no "
                + (
                    f"n of n:8 {between}; lower min_keep"
                    if coarse(task.types)
                    else f"rank {between}, with 'rank_multiple' {multiple}; lower min_keep or "
                    "rank_multiple"
                ),
            )
        decided.append(chosen)
    return _spread(decided, fraction, measure)


def elastic_uniform(
    tasks: list[LayerTask], allocation: Allocation, problems: Problems
) -> list[LayerTask]:
    """Apply `uniform` to each budget of an allocation.

    Returns
    -------
    list of LayerTask
        For the first budget, with the ranks of all budgets if there are several.
    """
    largest, *others = (uniform(tasks, each, problems) for each in allocation.all_budgets)
    if not others:
        return largest
    found = []
    for task, *smaller in zip(largest, *others, strict=True):
        separate = [task.config, *(each.config for each in smaller)]
        config = elastic_config(task, separate, allocation)
        if config is None:
            problems.add(
                "infeasible-budget",
                f"stages[{allocation.stage}].decompose.elastic",
                f"must leave {task.name} {list(task.shape)} dense at every budget or at none; "
                "raise the smallest budget, or list the layer under 'ignore'",
            )
        else:
            task = replace(task, config=config)
        found.append(task)
    return found


def _spread(tasks: list[LayerTask], fraction: float, measure: Measure) -> list[LayerTask]:
    """Give tasks with a few sizes the next larger one, spread evenly, as far as the budget goes.

    What rounding down leaves is carried from task to task and spent as soon as it pays for a larger
    size: layer by layer for each kind of matrix, smaller matrices first, whose remainder pays for
    next to nothing of a larger one.
    """
    spread, carried = list(tasks), 0.0

    def kind(i: int) -> tuple[int, str]:
        return tasks[i].dense_cost(measure), tasks[i].name.rpartition(".")[2]

    for i in sorted(range(len(tasks)), key=kind):
        task = tasks[i]
        if not task.config.compressed or not coarse(task.types):
            continue
        steps = SizeSteps(task, task.types)
        step = steps.within(fraction, measure)
        carried += fraction * task.dense_cost(measure) - steps.cost(step, measure)
        if step < steps.within(1, measure):
            price = steps.cost(step + 1, measure) - steps.cost(step, measure)
            if price <= carried:
                spread[i] = task.with_config(steps.config(step + 1))
                carried -= price
    return spread


def _even_fraction(tasks: list[LayerTask], allocation: Allocation, keep: float | None) -> float:
    """Return the fraction that, given to every task, spends a budget; 0 if there is none.

    `keep` is the fraction of all of them together, if it is known exactly.
    """
    left, others, measure = allocation.budget, tasks, allocation.measure
    while others:
        fraction = left / sum(task.dense_cost(measure) for task in others)
        if keep is not None and others is tasks:
            fraction = keep
        if fraction >= 1:
            return fraction
        fitting = [
            task
            for task in others
            if SizeSteps(task, task.types, ratio=task.ratio).within(
                fraction, measure, multiple=allocation.rank_multiple
            )
        ]
        if len(fitting) == len(others):
            return fraction
        left -= sum(task.dense_cost(measure) for task in others if task not in fitting)
        others = fitting
    return 0.0


def within(
    task: LayerTask, keep: float, measure: Measure, multiple: int, *, stated: float | None = None
) -> LayerTask:
    """Return the task with the largest sizes within a fraction of its dense cost.

    The note of a task that is too small gives the fraction `stated` in the recipe, if it is too
    small for that one as well.
    """
    if keep >= 1:
        return task.kept_dense("keep is 1" if keep == 1 else "the overrides leave enough for it")
    steps = SizeSteps(task, task.types, ratio=task.ratio)
    step = steps.within(keep, measure, multiple=multiple)
    if step > 0:
        return task.with_config(steps.config(step))
    if stated is not None and not steps.within(stated, measure, multiple=multiple):
        keep = stated
    return task.kept_dense(
        f"too small: {steps.config(multiple).description} needs more than {100 * keep:.3g}% of its "
        f"{measure.words}"
    )


def _without_budget(task: LayerTask, keep: float, measure: Measure, multiple: int) -> LayerTask:
    """Return a task that stays dense because the budget pays for none, with the reason."""
    alone = within(task, keep, measure, multiple)
    if alone.config.compressed:
        return task.kept_dense("weights that are too small for the budget use all of it")
    return alone


def check_pattern_fraction(
    key: str,
    tasks: list[LayerTask],
    keep: float,
    measure: Measure,
    problems: Problems,
) -> None:
    """Report a fraction that is too small for a pattern, the largest need first.

    A small weight without sizes normally stays dense. With pattern 2:4, a fraction below what every
    weight needs would leave all of them dense without a message.
    """
    needs = []
    for task in tasks:
        if task.pattern is None:
            continue
        dense = task.dense_cost(measure)
        least = SizeSteps(task, task.types, ratio=task.ratio).cost(1, measure)
        if keep * dense < least < dense:
            needs.append((least / dense, task))
    for need, task in sorted(needs, key=lambda pair: pair[0], reverse=True):
        problems.add(
            "infeasible-budget",
            key,
            f"must be at least {ceil(need * 1e4) / 1e4:g} of the {measure.words} for "
            f"{task.name} {list(task.shape)} with pattern {task.pattern}, got {keep:g}; raise keep "
            "or list the layer under 'ignore'",
        )
