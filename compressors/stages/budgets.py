"""Spend the budget of a ``decompose`` stage, or leave that to an allocation."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm, prod

from lrc.compressors.layers import ComponentConfig, QuantizationArgs
from lrc.compressors.methods.base import LOW_RANK_TYPES, FixedSizeMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.feasibility import cheapest, unreachable
from lrc.compressors.planning.measures import Measure, measure_of
from lrc.compressors.planning.needed_products import Choices, needed_products
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.stages.measured_times import check_table
from lrc.compressors.stages.uniform import check_pattern_fraction, elastic_uniform, within
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Learning, TensorTrain


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
    _check_factors(found, problems)
    if len(problems) > before:
        return found.tasks
    measure = measure_of(options.measure, draft.table)
    multiple = options.rank_multiple
    if not isinstance(METHODS[options.method], FixedSizeMethod):
        # A rank is the length of a factor's rows, which later quantization divides into groups.
        multiple = lcm(multiple, draft.group_multiple)
    schemes = tuple(QuantizationArgs.parse(s) for s in options.scheme_choices)
    if options.measure == "latency":
        add_products(draft, found, found.tasks)
        if len(problems) > before:
            return found.tasks
    fixed = [
        _overridden(task, found, measure, multiple, problems)
        for task in found.tasks
        if task.name in found.overrides
    ]
    rest = [task for task in found.tasks if task.name not in found.overrides]
    total = sum(task.dense_cost(measure) for task in found.tasks)
    if options.size is not None:
        budget = draft.whole.budget_bits(
            options.size, found.tasks, where, problems, options.component_types, schemes
        )
    else:
        assert options.largest_keep is not None
        if options.largest_keep == 1:
            return [*fixed, *(task.kept_dense("keep is 1") for task in rest)]
        budget = int(options.largest_keep * total)
    if measure.provisional and len(problems) == before:
        fixed, rest = [], found.tasks  # what overrides take is not known either
    budget -= sum(task.cost(task.config, measure) for task in fixed)
    if rest:
        _check_multiple(found, rest, measure, multiple, problems)
        _check_ratios(found, rest, measure, problems)
    if len(problems) > before:
        return [*fixed, *rest]
    allocation = Allocation(
        stage=found.index,
        allocator="heavy-tail" if options.allocation == "heavy-tail" else "lagrangian",
        budget=budget,
        measure=measure,
        types=options.component_types,
        quantization=schemes,
        ratios=options.ratios,
        rank_multiple=multiple,
        group_multiple=draft.group_multiple,
        min_keep=options.min_keep,
        max_relative_error=options.max_relative_error,
        keep=options.largest_keep,
        size=options.size,
        total=total,
        overrides=bool(options.overrides),
        elastic=tuple(options.elastic or ()),
        drafter=tuple(sorted(options.drafter or (), reverse=True)),
    )
    smallest, lowest = (
        0 if measure.provisional else cheapest(rest, allocation),
        allocation.all_budgets[-1],
    )
    if smallest > lowest.budget and (fixed or options.allocation != "uniform" or options.size):
        problems.append(unreachable(lowest, smallest))
    if len(problems) > before or not rest:
        return [*fixed, *rest]
    if options.allocation == "uniform" and not measure.provisional:
        return [*fixed, *elastic_uniform(rest, allocation, problems)]
    fraction = min(budget / sum(task.dense_cost(measure) for task in rest), 1)
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


def add_products(draft: Draft, found: DecomposeTargets, tasks: list[LayerTask]) -> None:
    """Add the products whose times a stage needs to the draft, and check that there are times."""
    options = found.options
    schemes = tuple(QuantizationArgs.parse(s) for s in options.scheme_choices)
    choices = Choices(options.component_types, schemes, options.ratios, options.rank_multiple)
    before = len(draft.products)
    draft.products += needed_products(tasks, choices)
    check_table(draft, found.where, [*draft.products[before:], *draft.head_products])


def _overridden(
    task: LayerTask, found: DecomposeTargets, measure: Measure, multiple: int, problems: Problems
) -> LayerTask:
    """Return the task with the budget of its override."""
    number, options = found.overrides[task.name], found.options
    override, key = options.overrides[number], f"{found.where}.overrides[{number}]"
    if override.rank is None:
        assert override.keep is not None
        check_pattern_fraction(f"{key}.keep", [task], override.keep, measure, problems)
        return within(task, override.keep, measure, multiple)
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
        return task.kept_dense(f"factors of rank {override.rank} would be larger than the weight")
    return task.with_config(config)


def _check_patterns(found: DecomposeTargets, problems: Problems) -> None:
    """Report weights whose shape cannot have the pattern; method `mixed` gives them other types."""
    if not isinstance(METHODS[found.options.method], FixedSizeMethod):
        return
    key, remedy = found.options.pattern_key
    for task in found.tasks:
        try:
            SizeSteps(task, task.types).config(1).tensors()
        except ValueError as error:
            problems.add(
                "pattern-mismatch",
                f"{found.where}.{key}",
                f"{task.name}: {error}; list the layer under 'ignore' or {remedy}",
            )


def _check_factors(found: DecomposeTargets, problems: Problems) -> None:
    """Report factors whose product is no dimension of a targeted matrix."""
    if not isinstance(found.options, TensorTrain) or not found.tasks:
        return
    dimensions = sorted({d for task in found.tasks for d in task.shape})
    for number, factors in enumerate(found.options.factors):
        if prod(factors) not in dimensions:
            problems.add(
                "no-match",
                f"{found.where}.factors[{number}]",
                f"must multiply to a dimension of a targeted matrix "
                f"({', '.join(map(str, dimensions))}), got {factors} with product "
                f"{prod(factors)}; correct or remove it",
            )


def _check_multiple(
    found: DecomposeTargets,
    tasks: list[LayerTask],
    measure: Measure,
    multiple: int,
    problems: Problems,
) -> None:
    """Report a multiple above every rank that makes its weight cheaper."""
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


def _check_ratios(
    found: DecomposeTargets, tasks: list[LayerTask], measure: Measure, problems: Problems
) -> None:
    """Report ratios at which the atoms for one coefficient cost as much as any weight."""
    if not isinstance(found.options, Learning):
        return
    largest = max(_most_atoms(task, measure) for task in tasks)
    for ratio in found.options.ratios:
        fits = any(SizeSteps(t, t.types, ratio=ratio).within(1, measure) for t in tasks)
        if largest > 0 and not fits:
            problems.add(
                "out-of-range",
                f"{found.where}.ratio",
                f"must be in [1, {largest}], above which the smallest dictionaries are as large as "
                f"the weights of this stage, got {ratio:g}; lower it",
            )


def _most_atoms(task: LayerTask, measure: Measure) -> int:
    """Return the largest number of atoms for one coefficient that makes the weight smaller."""

    def cost(atoms: int) -> int:
        component = ComponentConfig("dictionary", {"atoms": atoms, "nonzeros": 1})
        return task.cost(task.with_components((component,)), measure)

    return bisect_left(range(1, min(task.shape) + 1), task.dense_cost(measure), key=cost)
