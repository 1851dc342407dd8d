"""What every unit loses at the sizes it can have; layer by layer, each one file of the journal.

A method with a spectrum tells all its ranks at once, by energies computed without vectors. One that
is solved at given sizes is solved at some, from most of the bits down to few.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.io.journal import Journal
from lrc.compressors.io.progress import OnStep
from lrc.compressors.layers import FORMS, Sizes
from lrc.compressors.methods.base import RANK_FORMS, CodedMethod, Method
from lrc.compressors.methods.table import METHODS, LowRankMethod
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.rounding_error import rounding_noise
from lrc.compressors.planning.weight_groups import Unit, ratios_of
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.compressors.solvers.spectrum import energies_only
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Mixed
from lrc.configs.recipe import Recipe

NO_TOKEN = "saw no calibration token; stays dense"
# Shares of the bits at which a method without a spectrum is solved for an allocation; between them
# the logarithm of the energy is close to linear in the bits.
SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BETWEEN = 8
FORMS_OF = {
    **{form: [form] for form in RANK_FORMS},
    "sparse": ["sparse"],
    "pivoted_low_rank+sparse": ["low_rank_plus_sparse"],
    "dictionary": ["dictionary"],
    "dense": [],
}
"""Components that recipes name -> the forms they are stored as."""


@dataclass(frozen=True)
class Point:
    """A form and its sizes, and the energy that they lose."""

    form: str
    sizes: Sizes
    energy: float


@dataclass(frozen=True)
class Curve:
    """The energies of a unit, largest first, and the tokens they are summed over.

    `note` says why there are none. Those that are not `comparable` are no losses: one side of the
    layer has only ever seen zeros, or its weights are zeros. A method without a spectrum has
    `points` instead. `total` is the energy of the whole.
    """

    energies: Tensor
    n_tokens: int
    note: str | None = None
    comparable: bool = True
    points: list[Point] = field(default_factory=list)
    total: float = 0.0
    rounding: dict[str, float] = field(default_factory=dict)
    """Scheme of integers -> energy of what rounding the weight to it loses."""

    def lost(self, sizes: Sizes) -> float:
        """Return the energy lost at sizes that were looked at."""
        if list(sizes) == ["rank"]:
            return float(self.energies[sizes["rank"] :].sum())
        return min(p.energy for p in self.points if p.sizes == sizes)


def energies_file(layer: int) -> str:
    """Return the journal's name for the energies of the units that begin in a decoder layer."""
    return f"energies/layer-{layer:04d}.safetensors"


def curves_of(
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
                    unit,
                    recipe.decompositions[unit.first.stage],
                    reader,
                    statistics,
                    device,
                    recipe.seed,
                )
                for unit in here
            }
            facts = {name: _facts(curve) for name, curve in found.items()}
            journal.write_tensors(
                file, {name: c.energies for name, c in found.items()}, {"curves": facts}
            )
        facts = journal.read_facts(file)["curves"]
        for unit in here:
            key = _key(unit)
            points = [Point(**point) for point in facts[key]["points"]]
            fields = facts[key] | {"points": points}
            curves[unit.first.name] = Curve(journal.read_tensor(file, key), **fields)
        on_step("allocate", done, len(layers))
    return curves


def _key(unit: Unit) -> str:
    """Name the curve of a unit in the journal; one threshold is put to the bare weights."""
    name = unit.first.name
    return f"{name}.weight" if unit.first.pending == "heavy-tail" else name


def _facts(curve: Curve) -> dict[str, Any]:
    points = [{"form": p.form, "sizes": dict(p.sizes), "energy": p.energy} for p in curve.points]
    facts = {"n_tokens": curve.n_tokens, "note": curve.note, "comparable": curve.comparable}
    return facts | {"points": points, "total": curve.total, "rounding": curve.rounding}


def _curve(
    unit: Unit,
    options: DecomposeBase,
    reader: WeightReader,
    statistics: Callable[[Matrix], Statistics],
    device: str,
    seed: int,
) -> Curve:
    weights = [reader.read(f"{m.name}.weight", device=device) for m in unit.members]
    stack = torch.cat(weights)
    if unit.first.pending == "heavy-tail":
        return Curve(energies_only(stack).cpu(), 0)
    method = METHODS[options.method]
    known = [statistics(m) if method.needs_inputs else Statistics() for m in unit.members]
    none = torch.zeros(min(stack.shape), dtype=torch.float64)
    note = unknown(known, options)
    if note is not None:
        return Curve(none, 0, note)
    known = [each.to(device) for each in known]
    energies, points, total = none, [], 0.0
    alike = together(known)
    for part in method.parts:
        if not wanted(part, options):
            continue
        own = arguments(options, part, seed)
        if isinstance(part, CodedMethod):
            families = families_of(unit, part.form, options)
            sizes: list[Sizes] = []
            for _, run in families:
                sizes += [each for each in run if each not in sizes]
            found, total = part.energies(stack, alike, sizes, **own)
            for there, run in families:
                ends = [Point(part.form, each, found[sizes.index(each)]) for each in run]
                points += _filled(there, ends) if unit.first.pending else ends
        else:
            assert isinstance(part, LowRankMethod)
            energies = part.energies(stack, alike, **own).cpu()
    total = float(energies.sum()) or total
    rounding: dict[str, float] = {}
    if isinstance(options, Mixed) and options.schemes:
        rounding, total = rounding_noise(unit, options, stack, alike)
    comparable = total > 0 and not seen_nothing(known)
    return Curve(energies, known[0].n_tokens, None, comparable, points, total, rounding)


def wanted(part: Method, options: DecomposeBase) -> bool:
    """Say whether a stage allows what a part of its method makes."""
    allowed = [FORMS_OF[form] for form in getattr(options, "components", FORMS_OF)]
    return any(form in part.forms for forms in allowed for form in forms)


def families_of(unit: Unit, form: str, options: DecomposeBase) -> list[tuple[Unit, list[Sizes]]]:
    """Return the sizes that are planned, or those of `SHARES` of the bits, ratio by ratio.

    Every ratio has a curve of its own: what lies between two of its points is of no other.
    """
    if unit.sizes is not None:
        return [(unit, [unit.sizes] if unit.first.form == form else [])]
    ratios = ratios_of(options, form) if len(FORMS[form].SIZES) > 1 else [unit.ratio]
    families = []
    for ratio in ratios:
        there = unit.in_form(form).at_ratio(ratio)
        steps = [there.step_within(share, options.measure) for share in SHARES]
        sizes = [there.sizes_at(step) for step in dict.fromkeys(steps) if step > 0]
        families.append((there, sizes))
    return families


def _filled(unit: Unit, points: list[Point]) -> list[Point]:
    """Put points between those that were solved, by their largest numbers of stored values."""
    filled: list[Point] = []
    for high, low in pairwise(points):
        filled.append(high)
        top, bottom = (list(p.sizes.values())[-1] for p in (high, low))
        if min(high.energy, low.energy) <= 0:
            continue
        for part in range(1, BETWEEN):
            share = part / BETWEEN
            energy = high.energy ** (1 - share) * low.energy**share
            step = top - round(share * (top - bottom))
            if bottom < step < top and unit.sizes_at(step) != filled[-1].sizes:
                filled.append(Point(high.form, unit.sizes_at(step), energy))
    return filled + points[-1:]


def together(known: Sequence[Statistics]) -> Statistics:
    """Return what is known of the weights of a unit stacked along their outputs.

    Of several that is the sum of their input moments: no method that shares asks for more.

    Raises
    ------
    ValueError
        As `summed_inputs`.
    """
    if len(known) == 1:
        return known[0]
    return Statistics(known[0].n_tokens, summed_inputs(known))


def summed_inputs(known: Sequence[Statistics]) -> Moment:
    """Add up the input moments of layers that share a factor.

    Raises
    ------
    ValueError
        If only an image of one was accumulated.
    """
    return Moment.of(torch.stack([_inputs(each).whole() for each in known]).sum(dim=0))


def arguments(options: DecomposeBase, method: Method, seed: int = 0) -> dict[str, Any]:
    """Return the keys of a stage that are its method's own, or those of a part of it.

    A stage need not offer all keys of a part: what it lacks is for the part to fill in. `seed`, the
    recipe's, is for a method that makes random choices.
    """
    own = {key: getattr(options, key) for key in method.options if hasattr(options, key)}
    return own | ({"seed": seed} if "seed" in method.options else {})


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
