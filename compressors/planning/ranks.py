"""The allocation pass: from the singular values of every matrix and one budget to ranks.

Between calibration and factoring. The values are computed without vectors, layer by layer, each
layer one file of the journal, so that a killed run continues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.allocate import BudgetError, heavy_tail, lagrangian, options_of
from lrc.compressors.decompose import METHODS, Moment, Statistics, energies_only
from lrc.compressors.journal import Journal
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.budget import unreachable
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.planning.units import Unit, units_of
from lrc.compressors.progress import OnStep
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import DecomposeBase, Recipe

NO_TOKEN = "saw no calibration token; stays dense"


@dataclass(frozen=True)
class Curve:
    """The energies of a unit, largest first, and the tokens they are summed over.

    `note` says why there are none. Those that are not `comparable` are no losses: one side of the
    layer has only ever seen zeros, or its weights are zeros.
    """

    energies: Tensor
    n_tokens: int
    note: str | None = None
    comparable: bool = True


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
    """Give every pending matrix its rank, or leave it dense.

    Parameters
    ----------
    statistics : callable
        Returns what calibration knows of a matrix.
    on_step : callable
        Told (stage, layers done, layers) after each layer; what it raises stops the work there.
    every : bool
        Predict losses of the matrices whose rank is known too, where they have none yet.

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
    curves = _curves(wanted, recipe, reader, journal, statistics, device=device, on_step=on_step)
    decided: list[Unit] = []
    problems: list[str] = []
    for index, stage in enumerate(recipe.stages):
        options, budget = stage.decompose, plan.budgets[index] if plan.budgets else None
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


def energies_file(layer: int) -> str:
    """Return the journal's name for the energies of the units that begin in a decoder layer."""
    return f"energies/layer-{layer:04d}.safetensors"


def summed_inputs(known: Sequence[Statistics]) -> Moment:
    """Add up the input moments of layers that share a factor.

    Raises
    ------
    ValueError
        If only an image of one was accumulated.
    """
    return Moment.of(torch.stack([_inputs(each).whole() for each in known]).sum(dim=0))


def _allocate(
    pending: list[Unit], curves: dict[str, Curve], options: DecomposeBase, budget: int
) -> list[Unit]:
    """Spend the budget; what compares with nothing gets the share that all have on average."""
    measure, multiple = options.measure, options.rank_multiple
    share = budget / sum(unit.dense_cost(measure) for unit in pending)
    apart = [u for u in pending if not curves[u.first.name].comparable]
    even = [_even(unit, share, options) for unit in apart]
    pending = [u for u in pending if curves[u.first.name].comparable]
    budget -= sum(unit.spent(measure) for unit in even)
    if not pending:
        return even
    of = [curves[unit.first.name] for unit in pending]
    costs = [lambda rank, unit=unit: unit.step_cost(rank, measure) for unit in pending]
    dense = [unit.dense_cost(measure) for unit in pending]
    floors = [options.min_keep * cost for cost in dense]
    if options.allocation == "lagrangian":
        choices = [
            unit.only_dense(measure)
            if curve.note
            else options_of(
                curve.energies,
                cost,
                dense_cost,
                multiple=multiple,
                min_cost=floor,
                max_loss=options.max_loss,
            )
            for unit, curve, cost, dense_cost, floor in zip(
                pending, of, costs, dense, floors, strict=True
            )
        ]
        picked = lagrangian(choices, budget)
        ranks = [int(c.ranks[index]) for c, index in zip(choices, picked, strict=True)]
    else:
        values = [curve.energies.sqrt() for curve in of]
        ranks = heavy_tail(values, costs, dense, budget, multiple=multiple, min_costs=floors)
    return even + [
        _chosen(unit, rank, curve, options)
        for unit, rank, curve in zip(pending, ranks, of, strict=True)
    ]


def _even(unit: Unit, share: float, options: DecomposeBase) -> Unit:
    """Give a unit the largest rank within a share of its dense cost."""
    measure, multiple = options.measure, options.rank_multiple
    step = unit.step_within(share, measure, multiple=multiple)
    if step == 0 or unit.step_cost(step, measure) < options.min_keep * unit.dense_cost(measure):
        return unit.dense(note="saw zeros only, and no rank fits its share of the budget")
    return unit.at(unit.sizes_at(step))


def _chosen(unit: Unit, rank: int, curve: Curve, options: DecomposeBase) -> Unit:
    if curve.note:
        return unit.dense(note=curve.note)
    if rank == 0:
        return unit.dense(note=f"the {options.allocation} allocation spends its bits here")
    chosen = unit.at(rank)
    return chosen if options.allocation == "heavy-tail" else _predicted(chosen, curve, options)


def _predicted(unit: Unit, curve: Curve, options: DecomposeBase) -> Unit:
    """Write down what a unit loses at its rank."""
    rank = unit.first.rank
    assert rank is not None
    total, tail = float(curve.energies.sum()), float(curve.energies[rank:].sum())
    if curve.note or not curve.comparable or total == 0:
        return unit
    nats = METHODS[options.method].nats_per_token(tail, curve.n_tokens)
    return unit.at(rank, loss=tail / total, predicted_nats=nats)


def _curves(
    units: list[Unit],
    recipe: Recipe,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Matrix], Statistics],
    *,
    device: str,
    on_step: OnStep,
) -> dict[str, Curve]:
    """Return the curve of every unit by the name of its first matrix."""
    layers = sorted({unit.first.layer for unit in units})
    curves: dict[str, Curve] = {}
    for done, layer in enumerate(layers, start=1):
        here = [unit for unit in units if unit.first.layer == layer]
        file = energies_file(layer)
        known = journal.read_facts(file)["curves"] if journal.has(file) else {}
        if any(_key(unit) not in known for unit in here):
            found = {
                _key(unit): _curve(
                    unit, recipe.stages[unit.first.stage].decompose, reader, statistics, device
                )
                for unit in here
            }
            facts = {
                name: {"n_tokens": c.n_tokens, "note": c.note, "comparable": c.comparable}
                for name, c in found.items()
            }
            journal.write_tensors(
                file, {name: c.energies for name, c in found.items()}, {"curves": facts}
            )
        facts = journal.read_facts(file)["curves"]
        for unit in here:
            key = _key(unit)
            curves[unit.first.name] = Curve(journal.read_tensor(file, key), **facts[key])
        on_step("allocate", done, len(layers))
    return curves


def _key(unit: Unit) -> str:
    """Name the curve of a unit in the journal; one threshold is put to the bare weights."""
    name = unit.first.name
    return f"{name}.weight" if unit.first.pending == "heavy-tail" else name


def _curve(
    unit: Unit,
    options: DecomposeBase,
    reader: WeightReader,
    statistics: Callable[[Matrix], Statistics],
    device: str,
) -> Curve:
    weights = [reader.read(f"{m.name}.weight", device=device) for m in unit.members]
    stack = torch.cat(weights)
    if unit.first.pending == "heavy-tail":
        return Curve(energies_only(stack).cpu(), 0)
    method = METHODS[options.method]
    known = [statistics(m) if method.needs_inputs else Statistics() for m in unit.members]
    none = stack.new_zeros(unit.largest_step, dtype=torch.float64, device="cpu")
    note = unknown(known, options)
    if note is not None:
        return Curve(none, 0, note)
    known = [each.to(device) for each in known]
    if len(known) > 1:
        energies = energies_only(stack, summed_inputs(known), **arguments(options))
    else:
        energies = method.energies(stack, known[0], **arguments(options))
    energies = energies.cpu()
    comparable = bool(energies.any()) and not seen_nothing(known)
    return Curve(energies, known[0].n_tokens, comparable=comparable)


def arguments(options: DecomposeBase) -> dict[str, Any]:
    """Return the keys of a stage that are its method's own."""
    return {key: getattr(options, key) for key in METHODS[options.method].options}


def unknown(known: Sequence[Statistics], options: DecomposeBase) -> str | None:
    """Say why a unit cannot be weighed; None if all that its method needs is there."""
    lacking = {name for each in known for name in each.missing(METHODS[options.method].needs)}
    if not lacking:
        return None
    if all(each.n_tokens == 0 for each in known) or "inputs" in lacking:
        return NO_TOKEN
    return f"calibration has no {', '.join(sorted(lacking))} of it; stays dense"


def seen_nothing(known: Sequence[Statistics]) -> bool:
    """Say whether one side of a layer has only ever seen zeros.

    Its metric leaves that side out, and its energies, in another unit, compare with no others.
    """
    for each in known:
        moments = [each.inputs, each.gradients]
        sums = [each.input_magnitude, each.row_fisher]
        if any(m is not None and m.empty for m in moments):
            return True
        if any(s is not None and not bool(s.any()) for s in sums):
            return True
    return False


def _inputs(known: Statistics) -> Moment:
    assert known.inputs is not None
    return known.inputs
