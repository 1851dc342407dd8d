"""Rate-distortion curves: the squared error of every task as a function of its size.

A low-rank method gives all ranks at once, as singular values without vectors. A fixed-size method
is solved at some sizes, from most of the bits to few, and interpolated. Curves are computed layer
by layer; each layer is one file of the journal.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers import Sizes
from lrc.compressors.methods.base import FixedSizeMethod
from lrc.compressors.methods.group_statistics import combined, has_zero_statistics, missing_reason
from lrc.compressors.methods.table import METHODS, LowRankMethod
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.solvers.metric import damped_metric
from lrc.compressors.solvers.moments import Statistics
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.compressors.solvers.spectrum import energies_only

# Fractions of the cost at which a fixed-size method is solved; between them the logarithm of the
# error is close to linear in the size.
FRACTIONS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
POINTS_BETWEEN = 8
QUANTIZER_ERROR = {"rtn": 1.0, "gptq": 0.4}
"""Squared error relative to rounding to nearest; 0.33 to 0.46 on SmolLM2-135M's weights."""


@dataclass(frozen=True)
class Point:
    """Component types and sizes, and their squared error."""

    types: str
    sizes: Sizes
    squared_error: float


@dataclass(frozen=True)
class Curve:
    """The squared error of a task at the sizes that it can have."""

    energies: Tensor
    """Squared singular values, largest first; zeros for fixed-size methods."""
    n_tokens: int
    """Tokens that errors are summed over."""
    note: str | None = None
    """Why there is no curve."""
    comparable: bool = True
    """Whether errors are comparable with those of other tasks, see `has_zero_statistics`."""
    points: list[Point] = field(default_factory=list)
    """Sizes of fixed-size methods, solved or interpolated."""
    total: float = 0.0
    """Squared error of removing the weights."""
    quantization: dict[str, float] = field(default_factory=dict)
    """Integers -> squared error of quantizing the weight to them."""

    def squared_error(self, sizes: Sizes) -> float:
        """Return the squared error at sizes that the curve contains."""
        if list(sizes) == ["rank"]:
            return float(self.energies[sizes["rank"] :].sum())
        return min(p.squared_error for p in self.points if p.sizes == sizes)


def energies_file(layer: int) -> str:
    """Return the journal's name for the curves of the tasks of one decoder layer."""
    return f"energies/layer-{layer:04d}.safetensors"


def curves_for(
    tasks: Sequence[LayerTask],
    allocations: Sequence[Allocation],
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Weight], Statistics],
    *,
    device: str,
    on_step: OnStep,
) -> dict[str, Curve]:
    """Return the curve of every task by name."""
    layers = sorted({task.layer for task in tasks})
    curves: dict[str, Curve] = {}
    for done, layer in enumerate(layers, start=1):
        here: dict[str, tuple[LayerTask, Allocation | None]] = {}
        for task in tasks:
            if task.layer == layer:
                allocation = None if task.allocation is None else allocations[task.allocation]
                # Heavy-tail allocators use the bare weights, without statistics.
                bare = allocation is not None and allocation.allocator == "heavy-tail"
                here[f"{task.name}.weight" if bare else task.name] = task, allocation
        file = energies_file(layer)
        known = journal.read_facts(file)["curves"] if journal.has(file) else {}
        if not here.keys() <= known.keys():
            found = {key: _curve(*each, reader, statistics, device) for key, each in here.items()}
            known = {key: asdict(curve) for key, curve in found.items()}
            energies = {key: facts.pop("energies") for key, facts in known.items()}
            journal.write_tensors(file, energies, {"curves": known})
        for key, (task, _) in here.items():
            facts = known[key] | {"points": [Point(**point) for point in known[key]["points"]]}
            curves[task.name] = Curve(journal.read_tensor(file, key), **facts)
        on_step("allocate", done, len(layers))
    return curves


def _curve(
    task: LayerTask,
    allocation: Allocation | None,
    reader: WeightReader,
    statistics: Callable[[Weight], Statistics],
    device: str,
) -> Curve:
    stack = torch.cat([reader.read(f"{w.name}.weight", device=device) for w in task.weights])
    if allocation is not None and allocation.allocator == "heavy-tail":
        return Curve(energies_only(stack).cpu(), 0)
    method = METHODS[task.method]
    known = [statistics(w) if method.statistics else Statistics() for w in task.weights]
    energies = torch.zeros(min(stack.shape), dtype=torch.float64)
    note = missing_reason(known, method.statistics)
    if note is not None:
        return Curve(energies, 0, note)
    known = [each.to(device) for each in known]
    together = combined(known)
    points: list[Point] = []
    total = 0.0
    wanted = (task.config.types,) if allocation is None else allocation.types
    parts = {types: part for types, part in method.parts.items() if types in wanted}
    low_rank = next((part for part in parts.values() if isinstance(part, LowRankMethod)), None)
    if low_rank is not None:
        energies = low_rank.energies(stack, together, **low_rank.select(task.options)).cpu()
    for types, part in parts.items():
        if not isinstance(part, FixedSizeMethod):
            continue
        families = size_families(task, types, allocation)
        sizes: list[Sizes] = []
        for _, family in families:
            sizes += [each for each in family if each not in sizes]
        errors, total = part.squared_errors(stack, together, sizes, **part.select(task.options))
        for steps, family in families:
            solved = [Point(types, each, errors[sizes.index(each)]) for each in family]
            points += _interpolated(steps, solved) if task.pending else solved
    total = float(energies.sum()) or total
    quantization: dict[str, float] = {}
    if allocation is not None and allocation.quantization:
        quantization, total = _quantization_errors(task, allocation, stack, together)
    comparable = total > 0 and not has_zero_statistics(known)
    return Curve(energies, known[0].n_tokens, None, comparable, points, total, quantization)


def size_families(
    task: LayerTask, types: str, allocation: Allocation | None
) -> list[tuple[SizeSteps, list[Sizes]]]:
    """Return the planned sizes, or those at `FRACTIONS` of the cost for every ratio.

    Each ratio has a separate curve: interpolation between sizes of different ratios is meaningless.
    """
    if allocation is None:
        return [(SizeSteps(task, types, ratio=task.ratio), [task.config.sizes])]
    ratios = allocation.ratios if types == "dictionary" else (2.0,)
    families: list[tuple[SizeSteps, list[Sizes]]] = []
    for ratio in ratios:
        steps = SizeSteps(task, types, ratio=ratio)
        numbers = dict.fromkeys(steps.within(keep, allocation.measure) for keep in FRACTIONS)
        families.append((steps, [steps.config(number).sizes for number in numbers if number > 0]))
    return families


def _interpolated(steps: SizeSteps, points: Sequence[Point]) -> list[Point]:
    """Add points between solved ones, geometrically in the error, by their last size."""
    filled: list[Point] = []
    for high, low in pairwise(points):
        filled.append(high)
        top, bottom = (list(p.sizes.values())[-1] for p in (high, low))
        if min(high.squared_error, low.squared_error) <= 0:
            continue
        for number in range(1, POINTS_BETWEEN):
            position = number / POINTS_BETWEEN
            error = high.squared_error ** (1 - position) * low.squared_error**position
            step = top - round(position * (top - bottom))
            if bottom < step < top:
                sizes = steps.config(step).sizes
                if sizes != filled[-1].sizes:
                    filled.append(Point(high.types, sizes, error))
    return filled + list(points[-1:])


def _quantization_errors(
    task: LayerTask, allocation: Allocation, W: Tensor, known: Statistics
) -> tuple[dict[str, float], float]:
    """Return the squared error of quantizing a weight to each scheme, and that of removing it."""
    assert known.inputs is not None
    assert task.quantize is not None
    damping = {"damp": task.options["damp"], "gradient_damp": task.options["gradient_damp"]}
    metric, _ = damped_metric(known.inputs, known.gradients, **damping)
    H, factor = known.inputs.whole(), QUANTIZER_ERROR[task.quantize.quantizer]
    found = {}
    for args in allocation.quantization:
        if args.divides(task.shape[1]):
            W_hat = round_to_nearest(W, args, dtype=W.dtype, H=H).weight()
            found[str(args)] = float(metric.energy(W.double() - W_hat)) * factor
    return found, float(metric.energy(W.double()))
