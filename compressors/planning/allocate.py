"""The allocation pass, between calibration and factoring: from curves and one budget to sizes."""

from collections.abc import Callable
from functools import partial
from math import nan

from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.methods.table import METHODS
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.allocators import BudgetError, heavy_tail, lagrangian
from lrc.compressors.planning.budget import unreachable
from lrc.compressors.planning.candidates import (
    Choice,
    as_options,
    choices_of,
    only_whole,
    schemes_of,
)
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.planning.quantization import WHOLE, explained, rounded, unrounded
from lrc.compressors.planning.rate_distortion import Curve, curves_of
from lrc.compressors.planning.weight_groups import Unit, ratios_of, units_of
from lrc.compressors.solvers.moments import Statistics
from lrc.configs.decompose import DecomposeBase
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Recipe


def allocate_ranks(
    plan: Plan,
    recipe: Recipe,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Matrix], Statistics],
    *,
    device: str,
    on_step: OnStep,
    every: bool = False,
) -> Plan:
    """Give every pending matrix its form and sizes, or leave it dense.

    Parameters
    ----------
    statistics : callable
        Returns what calibration knows of a matrix.
    on_step : callable
        Told (stage, layers done, layers) after each layer; what it raises stops the work there.
    every : bool
        Predict losses of the matrices whose sizes are known too, where they have none yet.

    Returns
    -------
    Plan
        With the predicted losses of what was looked at; nothing is pending any more.

    Raises
    ------
    RecipeError
        If the budget is below what the cheapest choice costs; names the smallest that is not.
    """
    stages = {m.name: m.rounded for m in plan.matrices}
    plan = plan.with_matrices(unrounded(m) for m in plan.matrices)
    wanted = [
        unit
        for unit in units_of(plan.matrices)
        if unit.first.pending or (every and _predictable(unit.first))
    ]
    curves = curves_of(wanted, recipe, reader, journal, statistics, device=device, on_step=on_step)
    decided: list[Unit] = []
    problems: list[str] = []
    for index, options in recipe.decompositions.items():
        budget = plan.budgets[index] if plan.budgets else None
        of_stage = [unit for unit in wanted if unit.first.stage == index]
        pending = [unit for unit in of_stage if unit.first.pending]
        decided += [
            _predicted(unit, curves[unit.first.name], options)
            for unit in of_stage
            if not unit.first.pending
        ]
        if not pending:
            continue
        assert budget is not None
        try:
            decided += _allocate(pending, curves, options, budget)
        except BudgetError as error:
            where = f"stages[{index}].decompose"
            units = units_of(m for m in plan.matrices if m.stage == index)
            problems.append(unreachable(where, options, units, budget, error.smallest))
    if problems:
        raise RecipeError(explained(problems, recipe))
    plan = plan.with_matrices(m for unit in decided for m in unit.members)
    return plan.with_matrices(_rounded(m, stages[m.name], recipe) for m in plan.matrices)


def _predictable(matrix: Matrix) -> bool:
    """Say whether a curve can still tell what a matrix loses."""
    return matrix.sizes is not None and matrix.loss is None and matrix.form not in WHOLE


def _rounded(matrix: Matrix, stage: int | None, recipe: Recipe) -> Matrix:
    """Return a matrix as a later stage rounds it, if one does."""
    if stage is None or matrix.rounded is not None or stage not in recipe.quantizations:
        return matrix
    return rounded(matrix, recipe.quantizations[stage], stage)


def _allocate(
    pending: list[Unit], curves: dict[str, Curve], options: DecomposeBase, budget: int
) -> list[Unit]:
    """Spend the budget; what compares with nothing gets the share that all have on average."""
    measure = options.measure
    share = budget / sum(unit.dense_cost(measure) for unit in pending)
    even = []
    for unit in pending:
        curve = curves[unit.first.name]
        if not curve.comparable or (curve.note is not None and getattr(options, "schemes", [])):
            even.append(_even(unit, share, options, curve.note))
    apart = {unit.first.name for unit in even}
    pending = [u for u in pending if u.first.name not in apart]
    budget -= sum(unit.spent(measure) for unit in even)
    if not pending:
        return even
    dense = [unit.dense_cost(measure) for unit in pending]
    of = [curves[unit.first.name] for unit in pending]
    choices: list[Choice | None]
    if options.allocation == "lagrangian":
        each = [choices_of(unit, curve, options) for unit, curve in zip(pending, of, strict=True)]
        offered = [as_options(some, cost) for some, cost in zip(each, dense, strict=True)]
        picked = lagrangian(offered, budget)
        choices = [some[i] if i < len(some) else None for some, i in zip(each, picked, strict=True)]
    else:
        ranks = heavy_tail(
            [curve.energies.sqrt() for curve in of],
            [partial(unit.step_cost, measure=measure) for unit in pending],
            dense,
            budget,
            multiple=options.rank_multiple,
            min_costs=[options.min_keep * cost for cost in dense],
        )
        choices = [
            Choice(0, nan, unit.first.form, {"rank": rank}, None) if rank else None
            for unit, rank in zip(pending, ranks, strict=True)
        ]
    return even + [
        _chosen(unit, choice, curve, options)
        for unit, choice, curve in zip(pending, choices, of, strict=True)
    ]


def _even(unit: Unit, share: float, options: DecomposeBase, note: str | None = None) -> Unit:
    """Give a unit the largest sizes within a share of its dense cost, or the finest integers."""
    measure, multiple = options.measure, options.rank_multiple
    asked = [scheme for scheme in schemes_of(unit, options) if scheme is not None]
    integers = [unit.in_scheme(scheme).in_form("integers").at({}) for scheme in asked]
    if integers:
        limit = share * unit.dense_cost(measure)
        within = [each for each in integers if each.spent(measure) <= limit]
        if within:
            return max(within, key=lambda each: each.spent(measure))
        return min(integers, key=lambda each: each.spent(measure))
    if note is not None or only_whole(options):
        return unit.dense(note=note or "saw zeros only, and no scheme fits it")
    unit = unit.at_ratio(ratios_of(options)[0])
    step = unit.step_within(share, measure, multiple=multiple)
    if step == 0 or unit.step_cost(step, measure) < options.min_keep * unit.dense_cost(measure):
        return unit.dense(note="saw zeros only, and nothing fits its share of the budget")
    return unit.at(unit.sizes_at(step))


def _chosen(unit: Unit, choice: Choice | None, curve: Curve, options: DecomposeBase) -> Unit:
    if curve.note:
        return unit.dense(note=curve.note)
    if choice is None:
        return unit.dense(note=f"the {options.allocation} allocation spends its bits here")
    chosen = choice.of(unit)
    if options.allocation == "heavy-tail":
        return chosen
    return _predicted(chosen, curve, options, choice.loss)


def _predicted(unit: Unit, curve: Curve, options: DecomposeBase, lost: float | None = None) -> Unit:
    """Write down what a unit loses at its sizes, or the loss that was predicted for it."""
    assert unit.sizes is not None
    if curve.note or not curve.comparable or curve.total == 0:
        return unit
    lost = curve.lost(unit.sizes) if lost is None else lost
    nats = METHODS[options.method].nats_per_token(lost, curve.n_tokens)
    return unit.at(unit.sizes, loss=min(lost / curve.total, 1.0), predicted_nats=nats)
