"""Spend the budget of a ``decompose`` stage, or leave that to an allocation."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, lcm

from lrc.compressors.layers import ComponentConfig, QuantizationArgs
from lrc.compressors.methods.base import LOW_RANK_TYPES, FixedSizeMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.feasibility import cheapest, unreachable
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import MEASURE_NAMES, LayerTask
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Learning


@dataclass(frozen=True)
class DecomposeTargets:
    """A ``decompose`` stage and the tasks that it targets."""

    index: int
    where: str
    options: DecomposeBase
    tasks: list[LayerTask]
    """Dense so far."""
    overrides: Mapping[str, int]
    """Name of a weight -> number of its override."""
    alone: bool
    """Whether this is the only stage of its kind."""


def spend_budget(draft: Draft, found: DecomposeTargets) -> list[LayerTask]:
    """Return the tasks of a stage with configurations, or pending with a new allocation."""
    options, where, problems = found.options, found.where, draft.problems
    before = len(problems)
    _check_patterns(found, problems)
    if len(problems) > before:
        return found.tasks
    multiple = options.rank_multiple
    if not isinstance(METHODS[options.method], FixedSizeMethod):
        # A rank is the length of a factor's rows, which later quantization divides into groups.
        multiple = lcm(multiple, draft.group_multiple)
    schemes = tuple(QuantizationArgs.parse(s) for s in options.scheme_choices)
    fixed = [
        _overridden(task, found, multiple, problems)
        for task in found.tasks
        if task.name in found.overrides
    ]
    rest = [task for task in found.tasks if task.name not in found.overrides]
    total = sum(task.dense_cost(options.measure) for task in found.tasks)
    if options.size is not None:
        budget = draft.whole.budget_bits(
            options.size, found.tasks, where, problems, options.component_types, schemes
        )
    else:
        assert options.keep is not None
        if options.keep == 1:
            return [*fixed, *(task.dense("keep is 1") for task in rest)]
        budget = int(options.keep * total)
    budget -= sum(task.cost(task.config, options.measure) for task in fixed)
    if rest:
        _check_multiple(found, rest, multiple, problems)
        _check_ratios(found, rest, problems)
    if len(problems) > before or not rest:
        return [*fixed, *rest]
    allocation = Allocation(
        stage=found.index,
        allocator="heavy-tail" if options.allocation == "heavy-tail" else "lagrangian",
        budget=budget,
        measure=options.measure,
        types=options.component_types,
        quantization=schemes,
        ratios=options.ratios,
        rank_multiple=multiple,
        group_multiple=draft.group_multiple,
        min_keep=options.min_keep,
        max_relative_error=options.max_relative_error,
        keep=options.keep,
        size=options.size,
        total=total,
        overrides=bool(options.overrides),
    )
    smallest = cheapest(rest, allocation)
    if smallest > budget and not (options.allocation == "uniform" and options.keep):
        problems.append(unreachable(allocation, smallest))
        return [*fixed, *rest]
    if options.allocation == "uniform":
        return [*fixed, *_uniform(found, rest, allocation, problems)]
    fraction = budget / sum(task.dense_cost(options.measure) for task in rest)
    draft.allocations.append(allocation)
    pending = [
        replace(
            task,
            allocation=len(draft.allocations) - 1,
            estimated_bits=int(fraction * task.dense_bits),
        )
        for task in rest
    ]
    return [*fixed, *pending]


def _uniform(
    found: DecomposeTargets, tasks: list[LayerTask], allocation: Allocation, problems: Problems
) -> list[LayerTask]:
    """Give every task the same fraction of its cost."""
    options, multiple = found.options, allocation.rank_multiple
    if options.keep is not None:
        fraction = options.keep
        _check_pattern_fraction(f"{found.where}.keep", tasks, fraction, allocation, problems)
    else:
        fraction = _even_fraction(allocation.budget, tasks, multiple)
        if fraction <= options.min_keep:
            problems.add(
                "infeasible-budget",
                f"{found.where}.size",
                f"leaves every weight the same fraction {max(fraction, 0):.4g}, with 'min_keep' "
                f"{options.min_keep:g} and 'rank_multiple' {multiple}; raise size, or use "
                "allocation: lagrangian",
            )
            return tasks
    decided = []
    for task in tasks:
        chosen = _within(task, fraction, options, multiple)
        floor = options.min_keep * task.dense_cost(options.measure)
        if chosen.config.compressed and task.cost(chosen.config, options.measure) < floor:
            problems.add(
                "infeasible-budget",
                f"{found.where}.min_keep",
                f"{task.name} {list(task.shape)} has no rank that keeps between "
                f"{options.min_keep:g} and {fraction:g}, with 'rank_multiple' {multiple}; lower "
                "min_keep or rank_multiple",
            )
        decided.append(chosen)
    return decided


def _even_fraction(budget: int, tasks: list[LayerTask], multiple: int) -> float:
    """Return the fraction that, given to every task, spends a budget of bits.

    Tasks that are too small for the fraction stay dense, and the others share what remains.
    """
    left, others = budget, tasks
    while others:
        fraction = left / sum(task.dense_bits for task in others)
        if fraction <= 0:
            return 0.0
        fitting = [
            task
            for task in others
            if SizeSteps(task, task.types, ratio=task.ratio).within(
                fraction, "bits", multiple=multiple
            )
        ]
        if len(fitting) == len(others):
            return fraction
        left -= sum(task.dense_bits for task in others if task not in fitting)
        others = fitting
    return 0.0


def _within(task: LayerTask, keep: float, options: DecomposeBase, multiple: int) -> LayerTask:
    """Return the task with the largest sizes within a fraction of its dense cost."""
    if keep == 1:
        return task.dense("keep is 1")
    steps = SizeSteps(task, task.types, ratio=task.ratio)
    step = steps.within(keep, options.measure, multiple=multiple)
    if step > 0:
        return task.decided(steps.config(step))
    least = steps.config(multiple)
    rank = "rank " if "rank" in least.sizes else ""
    return task.dense(
        f"too small: {rank}{least.description} needs more than {keep:.0%} of its "
        f"{MEASURE_NAMES[options.measure]}"
    )


def _overridden(
    task: LayerTask, found: DecomposeTargets, multiple: int, problems: Problems
) -> LayerTask:
    """Return the task with the budget of its override."""
    number, options = found.overrides[task.name], found.options
    override, key = options.overrides[number], f"{found.where}.overrides[{number}]"
    if override.rank is None:
        assert override.keep is not None
        _check_pattern_fraction(f"{key}.keep", [task], override.keep, options, problems)
        return _within(task, override.keep, options, multiple)
    if task.types not in LOW_RANK_TYPES:
        problems.add("contradiction", f"{key}.rank", f"{options.method} has no ranks; give 'keep'")
        return task
    steps = SizeSteps(task, task.types)
    if override.rank > steps.largest:
        problems.add(
            "rank-out-of-range",
            f"{key}.rank",
            f"must be in [1, {steps.largest}] for {task.name} {list(task.shape)}, got "
            f"{override.rank}; lower rank or list the layer under 'ignore'",
        )
        return task
    config = steps.config(override.rank)
    if task.bits_of(config) >= task.dense_bits:
        return task.dense(f"factors of rank {override.rank} would be larger than the weight")
    return task.decided(config)


def _check_patterns(found: DecomposeTargets, problems: Problems) -> None:
    """Report weights whose shape cannot have the pattern."""
    for task in found.tasks:
        if task.pattern is None:
            continue
        try:
            SizeSteps(task, task.types).config(1)
        except ValueError as error:
            problems.add(
                "pattern-mismatch",
                f"{found.where}.pattern",
                f"{task.name}: {error}; list the layer under 'ignore' or use pattern: unstructured",
            )


def _check_pattern_fraction(
    key: str,
    tasks: list[LayerTask],
    keep: float,
    options: Allocation | DecomposeBase,
    problems: Problems,
) -> None:
    """Report a fraction that is too small for a pattern, the largest need first.

    A small weight without sizes normally stays dense. With pattern 2:4, a fraction below what every
    weight needs would leave all of them dense without a message.
    """
    measure, needs = options.measure, []
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
            f"must be at least {ceil(need * 1e4) / 1e4:g} of the {MEASURE_NAMES[measure]} for "
            f"{task.name} {list(task.shape)} with pattern {task.pattern}, got {keep:g}; raise keep "
            "or list the layer under 'ignore'",
        )


def _check_multiple(
    found: DecomposeTargets, tasks: list[LayerTask], multiple: int, problems: Problems
) -> None:
    """Report a multiple above every rank that makes its weight cheaper."""
    measure = found.options.measure
    largest = max(SizeSteps(t, t.types, ratio=t.ratio).within(1, measure) for t in tasks)
    if 0 < largest < multiple:
        grouped = (
            " (the group_size of a later 'quantize' is included: lower that first)"
            if multiple > found.options.rank_multiple
            else ""
        )
        problems.add(
            "out-of-range",
            f"{found.where}.rank_multiple",
            f"must be in [1, {largest}], the largest rank that makes a weight of this stage "
            f"smaller, got {multiple}; lower rank_multiple{grouped}",
        )


def _check_ratios(found: DecomposeTargets, tasks: list[LayerTask], problems: Problems) -> None:
    """Report ratios at which the atoms for one coefficient cost as much as any weight."""
    if not isinstance(found.options, Learning):
        return
    measure = found.options.measure
    largest = max(_most_atoms(task, found.options) for task in tasks)
    for ratio in found.options.ratios:
        fits = any(SizeSteps(t, t.types, ratio=ratio).within(1, measure) for t in tasks)
        if largest > 0 and not fits:
            problems.add(
                "out-of-range",
                f"{found.where}.ratio",
                f"must be in [1, {largest}], above which the smallest dictionaries are as large as "
                f"the weights of this stage, got {ratio:g}; lower it",
            )


def _most_atoms(task: LayerTask, options: DecomposeBase) -> int:
    """Return the largest number of atoms for one coefficient that makes the weight smaller."""

    def cost(atoms: int) -> int:
        component = ComponentConfig("dictionary", {"atoms": atoms, "nonzeros": 1})
        return task.cost(task.with_components((component,)), options.measure)

    return bisect_left(range(1, min(task.shape) + 1), task.dense_cost(options.measure), key=cost)
