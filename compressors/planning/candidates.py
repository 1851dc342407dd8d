"""What an allocation may make of one unit: forms, sizes and integers, by cost and by loss."""

from dataclasses import dataclass
from functools import partial

from lrc.compressors.layers import FORMS, RankForm, Sizes
from lrc.compressors.planning.allocators import Options, options_of
from lrc.compressors.planning.quantization import fits
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.weight_groups import Unit
from lrc.configs.decompose import DecomposeBase

# Energy of rounding two factors, or values and their atoms, over that of rounding the weight to the
# same integers: errors of both factors add up, and more of the numbers are large.
FACTORS_NOISE, VALUES_NOISE = 1.5, 1.2


@dataclass(frozen=True)
class Choice:
    """One thing that a unit may become; `cost` in the stage's measure, `loss` an energy."""

    cost: int
    loss: float
    form: str
    sizes: Sizes
    scheme: str | None

    def of(self, unit: Unit) -> Unit:
        """Return the unit so."""
        return unit.in_form(self.form).in_scheme(self.scheme).at(self.sizes)


def schemes_of(unit: Unit, options: DecomposeBase) -> list[str | None]:
    """Return how the numbers of a unit may be stored: as they are, and what fits its rows."""
    asked: list[str] = getattr(options, "schemes", [])
    return [None, *(scheme for scheme in asked if all(fits(scheme, m) for m in unit.members))]


def only_whole(options: DecomposeBase) -> bool:
    """Say whether no matrix of a stage may be decomposed: integers are all there is to choose."""
    return set(getattr(options, "components", [])) == {"dense"}


def choices_of(unit: Unit, curve: Curve, options: DecomposeBase) -> list[Choice]:
    """List the ranks of a spectrum and the points beside it that are worth their cost.

    They ascend in cost and descend in loss; all are cheaper than dense, which is not among them.
    """
    measure, dense = options.measure, unit.dense_cost(options.measure)
    if curve.note:
        return []
    floor, cap = options.min_keep * dense, options.max_loss * curve.total
    found: list[Choice] = []
    for scheme in schemes_of(unit, options):
        there = unit.in_scheme(scheme)
        noise = 0.0 if scheme is None else curve.rounding[scheme]
        whole = dense  # what factors have to be cheaper than, integers beside integers
        if scheme is not None:
            whole = there.in_form("integers").cost({}, measure)
            found.append(Choice(whole, noise, "integers", {}, scheme))
        if issubclass(FORMS[unit.first.form], RankForm):
            ranks = options_of(
                curve.energies,
                partial(there.step_cost, measure=measure),
                whole,
                multiple=there.rank_multiple(options),
                min_cost=floor,
                max_loss=options.max_loss,
            )
            columns = ranks.costs.tolist(), ranks.losses.tolist(), ranks.ranks.tolist()
            found += [
                Choice(cost, loss + FACTORS_NOISE * noise, unit.first.form, {"rank": rank}, scheme)
                for cost, loss, rank in zip(*columns, strict=True)
                if rank > 0
            ]
        for point in curve.points:
            if point.form == "low_rank_plus_sparse" and there.group > 1:
                continue  # its rank is a share of its values, and no multiple of a group
            cost = there.in_form(point.form).cost(point.sizes, measure)
            loss = point.energy + VALUES_NOISE * noise
            found.append(Choice(cost, loss, point.form, point.sizes, scheme))
    kept: list[Choice] = []
    for one in sorted(found, key=lambda each: (each.cost, each.loss)):
        fitting = floor <= one.cost < dense and one.loss <= cap
        if fitting and (not kept or (one.cost > kept[-1].cost and one.loss < kept[-1].loss)):
            kept.append(one)
    return kept


def as_options(choices: list[Choice], dense_cost: int) -> Options:
    """Return choices as an allocation takes them, numbered from 1, with dense behind them."""
    numbers = list(range(1, len(choices) + 1))
    return Options.of(numbers, [c.cost for c in choices], [c.loss for c in choices], dense_cost)
