"""The allocation pass, between calibration and factoring: from curves and one budget to sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lrc.compressors.allocate import BudgetError, Options, heavy_tail, lagrangian, options_of
from lrc.compressors.decompose import METHODS, Statistics
from lrc.compressors.journal import Journal
from lrc.compressors.layers import FORMS, RankForm, Sizes
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.budget import unreachable
from lrc.compressors.planning.curves import Curve, curves_of
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.planning.units import Unit, ratios_of, units_of
from lrc.compressors.progress import OnStep
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
    wanted = [
        unit
        for unit in units_of(plan.matrices)
        if unit.first.pending or (every and unit.sizes is not None and unit.first.loss is None)
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
        raise RecipeError(problems)
    return plan.with_matrices(m for unit in decided for m in unit.members)


@dataclass(frozen=True)
class _Choices:
    """What a unit may become: `options` number the entries of `forms` from 1; 0 is dense."""

    options: Options
    forms: list[tuple[str, Sizes]]

    @classmethod
    def of(cls, unit: Unit, curve: Curve, options: DecomposeBase) -> "_Choices":
        """List the ranks of a spectrum and the points beside it that are worth their cost."""
        measure, dense = options.measure, unit.dense_cost(options.measure)
        if curve.note:
            return cls(Options.of([], [], [], dense), [])
        floor, cap = options.min_keep * dense, options.max_loss * curve.total
        found: list[tuple[int, float, str, Sizes]] = []
        if issubclass(FORMS[unit.first.form], RankForm):
            ranks = options_of(
                curve.energies,
                lambda rank: unit.step_cost(rank, measure),
                dense,
                multiple=options.rank_multiple,
                min_cost=floor,
                max_loss=options.max_loss,
            )
            columns = ranks.costs.tolist(), ranks.losses.tolist(), ranks.ranks.tolist()
            found += [
                (cost, loss, unit.first.form, {"rank": rank})
                for cost, loss, rank in zip(*columns, strict=True)
                if rank > 0
            ]
        for point in curve.points:
            cost = unit.in_form(point.form).cost(point.sizes, measure)
            if floor <= cost < dense and point.energy <= cap:
                found.append((cost, point.energy, point.form, point.sizes))
        kept: list[tuple[int, float, str, Sizes]] = []
        for one in sorted(found, key=lambda each: each[:2]):
            if not kept or (one[0] > kept[-1][0] and one[1] < kept[-1][1]):
                kept.append(one)
        numbers = list(range(1, len(kept) + 1))
        costs, losses = [one[0] for one in kept], [one[1] for one in kept]
        return cls(Options.of(numbers, costs, losses, dense), [one[2:] for one in kept])


def _allocate(
    pending: list[Unit], curves: dict[str, Curve], options: DecomposeBase, budget: int
) -> list[Unit]:
    """Spend the budget; what compares with nothing gets the share that all have on average."""
    measure = options.measure
    share = budget / sum(unit.dense_cost(measure) for unit in pending)
    apart = [u for u in pending if not curves[u.first.name].comparable]
    even = [_even(unit, share, options) for unit in apart]
    pending = [u for u in pending if curves[u.first.name].comparable]
    budget -= sum(unit.spent(measure) for unit in even)
    if not pending:
        return even
    of = [curves[unit.first.name] for unit in pending]
    decided: list[tuple[str, Sizes] | None]
    if options.allocation == "lagrangian":
        choices = [_Choices.of(u, curve, options) for u, curve in zip(pending, of, strict=True)]
        picked = lagrangian([each.options for each in choices], budget)
        numbers = [int(c.options.ranks[i]) for c, i in zip(choices, picked, strict=True)]
        decided = [c.forms[n - 1] if n else None for c, n in zip(choices, numbers, strict=True)]
    else:
        dense = [unit.dense_cost(measure) for unit in pending]
        ranks = heavy_tail(
            [curve.energies.sqrt() for curve in of],
            [partial(unit.step_cost, measure=measure) for unit in pending],
            dense,
            budget,
            multiple=options.rank_multiple,
            min_costs=[options.min_keep * cost for cost in dense],
        )
        named = zip(pending, ranks, strict=True)
        decided = [(unit.first.form, {"rank": rank}) if rank else None for unit, rank in named]
    return even + [
        _chosen(unit, choice, curve, options)
        for unit, choice, curve in zip(pending, decided, of, strict=True)
    ]


def _even(unit: Unit, share: float, options: DecomposeBase) -> Unit:
    """Give a unit the largest sizes within a share of its dense cost."""
    measure, multiple = options.measure, options.rank_multiple
    unit = unit.at_ratio(ratios_of(options)[0])
    step = unit.step_within(share, measure, multiple=multiple)
    if step == 0 or unit.step_cost(step, measure) < options.min_keep * unit.dense_cost(measure):
        return unit.dense(note="saw zeros only, and nothing fits its share of the budget")
    return unit.at(unit.sizes_at(step))


def _chosen(
    unit: Unit, choice: tuple[str, Sizes] | None, curve: Curve, options: DecomposeBase
) -> Unit:
    if curve.note:
        return unit.dense(note=curve.note)
    if choice is None:
        return unit.dense(note=f"the {options.allocation} allocation spends its bits here")
    form, sizes = choice
    chosen = unit.in_form(form).at(sizes)
    return chosen if options.allocation == "heavy-tail" else _predicted(chosen, curve, options)


def _predicted(unit: Unit, curve: Curve, options: DecomposeBase) -> Unit:
    """Write down what a unit loses at its sizes."""
    assert unit.sizes is not None
    if curve.note or not curve.comparable or curve.total == 0:
        return unit
    lost = curve.lost(unit.sizes)
    nats = METHODS[options.method].nats_per_token(lost, curve.n_tokens)
    return unit.at(unit.sizes, loss=lost / curve.total, predicted_nats=nats)
