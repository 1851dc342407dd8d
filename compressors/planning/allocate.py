"""Choose the configurations of pending tasks from rate-distortion curves and budgets."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers import WeightConfig
from lrc.compressors.methods.table import METHODS, Quantization
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.allocators import BudgetError, heavy_tail, lagrangian
from lrc.compressors.planning.candidates import (
    Candidate,
    candidates_for,
    joint_candidates,
    schemes_for,
    tail_candidates,
)
from lrc.compressors.planning.draft_speed import PredictedPair
from lrc.compressors.planning.elastic import nested_choices, with_budgets
from lrc.compressors.planning.feasibility import unreachable
from lrc.compressors.planning.fused_layers import fused_groups
from lrc.compressors.planning.plan import Allocation, Plan
from lrc.compressors.planning.predicted_times import predicted_times
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.rate_distortion import Curve, curves_for
from lrc.compressors.planning.refinements import elastic_config, is_refined, refined_choices
from lrc.compressors.planning.required_statistics import with_statistics
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerResult, LayerTask, Weight
from lrc.compressors.solvers.moments import Statistics

ALLOCATORS = {
    "lagrangian": (candidates_for, lagrangian),
    "heavy-tail": (tail_candidates, heavy_tail),
}

NO_FASTER_PAIR = (
    "drafter: at no budget is the pair predicted to be faster than the parent alone; the one that "
    "slows it down least was chosen"
)


def allocate(
    plan: Plan,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Weight], Statistics],
    *,
    device: str,
    on_step: OnStep,
    predict_all: bool = False,
    finished: Callable[[int], None] = lambda layer: None,
) -> Plan:
    """Choose the configuration of every pending task.

    Parameters
    ----------
    statistics : callable
        Returns the calibration statistics of a weight, on `device`.
    predict_all : bool
        Predict the losses of tasks with known configurations too, unless known.
    finished : callable
        Called with a layer when its statistics are no longer needed for this.

    Returns
    -------
    Plan
        Without pending tasks, with predicted losses in its results.

    Raises
    ------
    RecipeError
        If a budget is below the cost of the cheapest candidates; names the smallest feasible one.
    """
    assert not plan.unmeasured
    pending = [task for task in plan.tasks if task.pending]
    known = [task for task in plan.tasks if predict_all and _predictable(task, plan)]
    curves = curves_for(
        [*pending, *known],
        plan.allocations,
        reader,
        journal,
        statistics,
        device=device,
        on_step=on_step,
        finished=finished,
    )
    decided: list[LayerTask] = []
    results = {task.name: _prediction(task, curves[task.name], None) for task in known}
    problems = Problems()
    for index, allocation in enumerate(plan.allocations):
        tasks = [task for task in pending if task.allocation == index]
        try:
            if allocation.drafter and tasks:
                pairs, allocation = _fastest_pair(plan, tasks, curves, allocation)
                kept = [*plan.allocations]
                kept[index] = allocation
                plan = replace(plan, allocations=kept, pairs=pairs)
                if not any(pair.drafts for pair in pairs):
                    plan = replace(plan, warnings=[*plan.warnings, NO_FASTER_PAIR])
            decide = _decide_elastic if allocation.elastic else _decide
            for task, loss in decide(tasks, curves, allocation):
                decided.append(with_statistics(task))
                if allocation.allocator == "lagrangian" and loss is not None:
                    results[task.name] = _prediction(task, curves[task.name], loss)
        except BudgetError as error:
            problems.append(unreachable(allocation.all_budgets[-1], error.smallest))
    problems.raise_if_any()
    return plan.with_tasks(decided).with_results(results)


def _fastest_pair(
    plan: Plan, tasks: Sequence[LayerTask], curves: dict[str, Curve], allocation: Allocation
) -> tuple[tuple[PredictedPair, ...], Allocation]:
    """Predict the speed of a drafter at each budget; return all, and the one that is fastest.

    A step takes time in proportion to the bytes of the whole model or, with measured times, to the
    products with the targeted matrices.
    """
    budgets, pairs = allocation.all_budgets, []
    for each in budgets:
        decided = _decide(tasks, curves, each)
        nats = sum(
            _prediction(task, curves[task.name], loss).predicted_nats or 0.0
            for task, loss in decided
            if loss is not None
        )
        planned = plan.with_tasks(task for task, _ in decided)
        times = predicted_times(planned)
        cost = planned.compressed_bytes / planned.dense_bytes if times is None else times.ratio
        assert each.keep is not None
        pairs.append(PredictedPair.predict(each.keep, nats, cost))
    best = max(range(len(pairs)), key=lambda i: (pairs[i].speed, pairs[i].with_one_draft))
    pairs[best] = replace(pairs[best], chosen=True)
    return tuple(pairs), budgets[best]


def _predictable(task: LayerTask, plan: Plan) -> bool:
    """Return whether a curve can predict the loss of a task with a known configuration."""
    solved = not isinstance(METHODS[task.method], Quantization)
    solved = solved and task.config.at_budget(-1).types in METHODS[task.method].types
    result = plan.results.get(task.name)
    return not task.pending and solved and (result is None or result.relative_error is None)


def _decide(
    tasks: Sequence[LayerTask], curves: dict[str, Curve], allocation: Allocation
) -> list[tuple[LayerTask, float | None]]:
    """Return the tasks with their configurations and losses; None where dense or incomparable.

    Tasks whose losses are not comparable get the average fraction of the budget.
    """
    if not tasks:
        return []
    measure, spent = allocation.measure, 0
    fraction = allocation.budget / sum(task.dense_cost(measure) for task in tasks)
    found: list[tuple[LayerTask, float | None]] = []
    compared: list[LayerTask] = []
    fused = fused_groups(task.name for task in tasks) if allocation.one_scheme else []
    partners = {name: tuple(group) for group in fused for name in group}

    def predictable(name: str) -> bool:
        curve = curves[name]
        return curve.comparable and (curve.note is None or not allocation.quantization)

    first: dict[str, WeightConfig] = {}
    for task in tasks:
        group = partners.get(task.name, (task.name,))
        if all(map(predictable, group)):
            compared.append(task)
            continue
        note = curves[task.name].note
        if group[0] in first:
            config = _with_scheme_of(first[group[0]], task)
        else:
            config, note = _at_fraction(task, fraction, allocation, note)
            first[group[0]] = config
        found.append((task.with_config(config, note), None))
        # The budget counts sizes before a later stage quantizes them.
        spent += task.cost(config, measure)
    offer, allocator = ALLOCATORS[allocation.allocator]
    offers = {task.name: offer(task, curves[task.name], allocation) for task in compared}
    groups = [*dict.fromkeys(partners.get(name, (name,)) for name in offers)]
    candidates = [joint_candidates([offers[name] for name in group]) for group in groups]
    try:
        picked = allocator(candidates, allocation.budget - spent)
    except BudgetError as error:
        raise BudgetError(allocation.budget, error.smallest + spent) from error
    chosen: dict[str, Candidate] = {}
    for group, offered, index in zip(groups, candidates, picked, strict=True):
        chosen |= zip(group, offered[index].parts, strict=True)
    for task in compared:
        config, loss = chosen[task.name].config, chosen[task.name].loss
        if config.compressed:
            found.append((task.with_config(config), loss))
        else:
            note = curves[task.name].note
            note = note or f"kept dense by the {allocation.allocator} allocator"
            found.append((task.kept_dense(note), None))
    return found


def _decide_elastic(
    tasks: Sequence[LayerTask], curves: dict[str, Curve], allocation: Allocation
) -> list[tuple[LayerTask, float | None]]:
    """Return the same as `_decide` for the largest budget, with ranks for all budgets."""
    budgets = allocation.all_budgets
    total = sum(task.dense_cost(allocation.measure) for task in tasks)
    left = [each.budget for each in budgets]
    found: list[tuple[LayerTask, float | None]] = []
    offers: dict[str, list[Candidate]] = {}
    for task in tasks:
        if curves[task.name].comparable:
            offers[task.name] = candidates_for(task, curves[task.name], allocation)
            continue
        parts = [_at_fraction(task, each.budget / total, each, None) for each in budgets]
        config, note = elastic_config(task, [part[0] for part in parts], allocation), parts[-1][1]
        config = WeightConfig(task.shape) if config is None else config
        found.append((task.with_config(config, note), None))
        for index in range(len(budgets)):
            left[index] -= task.cost(config.at_budget(index), allocation.measure)
    compared = [task for task in tasks if task.name in offers]
    try:
        chosen = _choose_elastic(compared, offers, curves, left, allocation)
    except BudgetError as error:
        others = budgets[-1].budget - left[-1]
        raise BudgetError(budgets[-1].budget, error.smallest + others) from error
    for task, (config, largest) in zip(compared, chosen, strict=True):
        if config.compressed:
            found.append((task.with_config(config), largest.loss))
        else:
            note = curves[task.name].note or "kept dense at all budgets by the lagrangian allocator"
            found.append((task.kept_dense(note), None))
    return found


def _choose_elastic(
    tasks: Sequence[LayerTask],
    offers: dict[str, list[Candidate]],
    curves: dict[str, Curve],
    budgets: Sequence[int],
    allocation: Allocation,
) -> list[tuple[WeightConfig, Candidate]]:
    """Return the configuration of every task for all budgets, and the choice for the largest."""
    candidates = [offers[task.name] for task in tasks]
    if is_refined(allocation):
        return refined_choices(
            candidates,
            tasks,
            [curves[task.name] for task in tasks],
            budgets,
            allocation.measure,
            multiple=allocation.rank_multiple,
        )
    found = []
    for each, *picked in zip(candidates, *nested_choices(candidates, budgets), strict=True):
        config = with_budgets([each[index].config for index in picked])
        assert config is not None
        found.append((config, each[picked[0]]))
    return found


def _at_fraction(
    task: LayerTask, fraction: float, allocation: Allocation, note: str | None
) -> tuple[WeightConfig, str | None]:
    """Return a configuration within a fraction of the dense cost; a reason if it is dense.

    That is the largest quantized matrix that fits, else the smallest; without integers to choose
    from, the largest configuration of the first type.
    """
    measure, dense = allocation.measure, task.dense_cost(allocation.measure)
    integers = [
        SizeSteps(task, "dense", args).config(1)
        for args in schemes_for(task, allocation.quantization)
        if args is not None
    ]
    if integers:
        costs = {task.cost(config, measure): config for config in integers}
        if min(costs) >= dense:
            return WeightConfig(task.shape), "no integers are faster or smaller than the weight"
        within = [cost for cost in costs if cost <= fraction * dense and cost < dense]
        return costs[max(within) if within else min(costs)], task.note
    if note is not None or not allocation.types:
        return task.config, note or "saw zeros only, and no integers fit its rows"
    steps = SizeSteps(task, allocation.types[0], ratio=min(allocation.ratios))
    step = steps.within(fraction, measure, multiple=allocation.rank_multiple)
    if step == 0 or steps.cost(step, measure) < allocation.min_keep * dense:
        return task.config, "saw zeros only, and nothing fits its part of the budget"
    return steps.config(step), task.note


def _with_scheme_of(config: WeightConfig, task: LayerTask) -> WeightConfig:
    """Return the configuration of a task with the integers of another one, or dense like it."""
    args = config.quantization
    return SizeSteps(task, "dense", args).config(1) if args else WeightConfig(task.shape)


def _prediction(task: LayerTask, curve: Curve, loss: float | None) -> LayerResult:
    """Return the predicted loss of a decided task."""
    if curve.note or not curve.comparable or curve.total == 0:
        return LayerResult(task.config)
    error = curve.squared_error(task.config.sizes) if loss is None else loss
    nats = METHODS[task.method].predicted_increase(error, curve.n_tokens)
    return LayerResult(task.config, min(error / curve.total, 1.0), nats)
