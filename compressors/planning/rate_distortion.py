"""Rate-distortion curves: the squared error of every task as a function of its size.

For low-rank methods, the singular values give the error at every rank. All other methods (sparse,
dictionaries, sums), called fixed-size methods, must be solved for every size separately. They are
solved at some sizes, those with `FRACTIONS` of the cost of the dense weight, and interpolated in
between. Curves are computed layer by layer and kept in the journal, the folder of finished
intermediate results, one file per layer. Those of experts of equal shape are computed together: on
a GPU most of the time for one small matrix passes between its many short steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers import Sizes
from lrc.compressors.methods.base import FixedSizeMethod
from lrc.compressors.methods.group_statistics import combined, has_zero_statistics, missing_reason
from lrc.compressors.methods.size_families import coarse
from lrc.compressors.methods.table import METHODS, LowRankMethod
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.equal_tasks import split_batches
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.solvers.metric import damped_metric
from lrc.compressors.solvers.moments import Statistics
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.compressors.solvers.spectrum import energies_only

# Fractions of the dense cost (bits or multiply-adds) at which a fixed-size method is solved.
# Between them, the logarithm of the error is close to linear in the size.
FRACTIONS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
POINTS_BETWEEN = 8
NUMBERS = {"cuda": 2**26}
"""Weights and entries of second moments of matrices whose curves are computed together, by type of
device; a full batch takes about 4 GiB."""
QUANTIZER_ERROR = {"rtn": 1.0, "gptq": 0.4}
"""Squared error of each quantizer over that of rounding to nearest. For `gptq`, 0.33 to 0.46 were
measured on the weights of SmolLM2-135M."""


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
    """Squared singular values of the weight in the metric of the method, largest first; zeros for
    fixed-size methods."""
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
    """Scheme, such as ``int4-g64`` -> squared error of quantizing the weight to it."""

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
    finished: Callable[[int], None] = lambda layer: None,
) -> dict[str, Curve]:
    """Return the curve of every task by name.

    `finished` is called with a layer when its curves are stored. The last layer comes first, as in
    the backward pass.
    """
    layers = sorted({task.layer for task in tasks}, reverse=True)
    curves: dict[str, Curve] = {}
    for done, layer in enumerate(layers, start=1):
        requested: dict[str, tuple[LayerTask, Allocation | None]] = {}
        for task in tasks:
            if task.layer == layer:
                allocation = None if task.allocation is None else allocations[task.allocation]
                # The heavy-tail allocator uses no statistics. Such curves have another key, so that
                # a task can have both kinds.
                bare = allocation is not None and allocation.allocator == "heavy-tail"
                requested[f"{task.name}.weight" if bare else task.name] = task, allocation
        file = energies_file(layer)
        saved = journal.read_facts(file)["curves"] if journal.has(file) else {}
        if not requested.keys() <= saved.keys():
            computed: dict[str, Curve] = {}
            for keys in _batches(requested, device):
                together = [requested[key][0] for key in keys]
                allocation = requested[keys[0]][1]
                found = _curves(together, allocation, reader, statistics, device)
                computed |= zip(keys, found, strict=True)
            saved = {key: asdict(computed[key]) for key in requested}
            energies = {key: facts.pop("energies") for key, facts in saved.items()}
            journal.write_tensors(file, energies, {"curves": saved})
            finished(layer)
        for key, (task, _) in requested.items():
            facts = saved[key] | {"points": [Point(**point) for point in saved[key]["points"]]}
            curves[task.name] = Curve(journal.read_tensor(file, key), **facts)
        on_step("allocate", done, len(layers))
    return curves


def _batches(
    requested: Mapping[str, tuple[LayerTask, Allocation | None]], device: str
) -> list[list[str]]:
    """Split the keys of a layer's tasks into batches of tasks that differ in their names only."""
    tasks = {key: task for key, (task, _) in requested.items()}

    def kind(key: str) -> str | None:
        found = _kind(tasks[key])
        return None if found is None else f"{key == tasks[key].name} {found}"

    return split_batches(tasks, kind, lambda key: _size(tasks[key]), _limit(device))


def curve_batches(tasks: Sequence[LayerTask], device: str) -> list[list[LayerTask]]:
    """Split the tasks of a layer as `curves_for` does, for curves that need statistics."""
    return split_batches(tasks, _kind, _size, _limit(device))


def _kind(task: LayerTask) -> str | None:
    return None if len(task.weights) > 1 else str(replace(task, weights=()))


def _size(task: LayerTask) -> int:
    d_out, d_in = task.shape
    return d_out * d_in + d_out**2 + d_in**2


def _limit(device: str) -> int:
    return NUMBERS.get(torch.device(device).type, 0)


@dataclass(frozen=True)
class _Known:
    """A task with its weights stacked along their outputs, and their statistics."""

    task: LayerTask
    W: Tensor
    statistics: Statistics
    zero: bool
    """See `has_zero_statistics`."""


def _curves(
    tasks: Sequence[LayerTask],
    allocation: Allocation | None,
    reader: WeightReader,
    statistics: Callable[[Weight], Statistics],
    device: str,
) -> list[Curve]:
    """Return the curves of tasks that differ in their names only."""
    method, found, known = METHODS[tasks[0].method], dict[str, Curve](), list[_Known]()
    for task in tasks:
        W = torch.cat([reader.read(f"{w.name}.weight", device=device) for w in task.weights])
        if allocation is not None and allocation.allocator == "heavy-tail":
            found[task.name] = Curve(energies_only(W).cpu(), 0)
            continue
        per_weight = [statistics(w) if method.statistics else Statistics() for w in task.weights]
        note = missing_reason(per_weight, method.statistics)
        if note is not None:
            found[task.name] = Curve(torch.zeros(min(W.shape), dtype=torch.float64), 0, note)
            continue
        zero = has_zero_statistics(per_weight)
        known.append(_Known(task, W, combined(per_weight), zero))
    if known:
        solved = _solved_curves(known, allocation)
        found |= {each.task.name: curve for each, curve in zip(known, solved, strict=True)}
    return [found[task.name] for task in tasks]


def _solved_curves(known: Sequence[_Known], allocation: Allocation | None) -> list[Curve]:
    """Return the curves of tasks that differ in their names only, from their statistics."""
    task = known[0].task
    weights, statistics = [each.W for each in known], [each.statistics for each in known]
    wanted = (task.config.at_budget(-1).types,) if allocation is None else allocation.types
    parts = {types: p for types, p in METHODS[task.method].parts.items() if types in wanted}
    low_rank = next((part for part in parts.values() if isinstance(part, LowRankMethod)), None)
    energies = [torch.zeros(min(W.shape), dtype=torch.float64) for W in weights]
    if low_rank is not None:
        options = low_rank.select(task.options)
        energies = [low_rank.energies(each.W, each.statistics, **options).cpu() for each in known]
    points: list[list[Point]] = [[] for _ in known]
    totals = [0.0] * len(known)  # the same for all parts: they share the metric of the method
    for types, part in parts.items():
        if not isinstance(part, FixedSizeMethod):
            continue
        families = size_families(task, types, allocation)
        sizes: list[Sizes] = []
        for _, family in families:
            sizes += [each for each in family if each not in sizes]
        solved = part.squared_errors_of(weights, statistics, sizes, **part.select(task.options))
        for number, (errors, total) in enumerate(solved):
            totals[number] = total
            for steps, family in families:
                own = [Point(types, each, errors[sizes.index(each)]) for each in family]
                points[number] += _interpolated(steps, own) if task.pending else own
    curves = []
    for number, each in enumerate(known):
        total = float(energies[number].sum()) or totals[number]
        integers: dict[str, float] = {}
        if allocation is not None and allocation.quantization:
            integers, total = _quantization_errors(task, allocation, each.W, each.statistics)
        n_tokens, comparable = each.statistics.n_tokens, total > 0 and not each.zero
        curves.append(
            Curve(energies[number], n_tokens, None, comparable, points[number], total, integers)
        )
    return curves


def size_families(
    task: LayerTask, types: str, allocation: Allocation | None
) -> list[tuple[SizeSteps, list[Sizes]]]:
    """Return the sizes to solve for: the planned ones, or those at `FRACTIONS` of the dense cost.

    Of types with a few sizes, all that are cheaper than the dense weight are solved for.

    An allocation of dictionaries has one family per ratio, because interpolation between sizes of
    different ratios is meaningless.
    """
    if allocation is None:
        return [(SizeSteps(task, types, ratio=task.ratio), [task.config.sizes])]
    ratios = allocation.ratios if types == "dictionary" else (2.0,)  # unused by other types
    families: list[tuple[SizeSteps, list[Sizes]]] = []
    for ratio in ratios:
        steps = SizeSteps(task, types, ratio=ratio)
        if coarse(types):
            numbers = list(range(steps.within(1, allocation.measure), 0, -1))
        else:
            numbers = [steps.within(keep, allocation.measure) for keep in FRACTIONS]
            numbers = list(dict.fromkeys(numbers))
        families.append((steps, [steps.config(number).sizes for number in numbers if number > 0]))
    return families


def _interpolated(steps: SizeSteps, points: Sequence[Point]) -> list[Point]:
    """Insert points between consecutive solved ones.

    The last size, which is the step of `SizeSteps` for all components, is interpolated linearly,
    and the squared error geometrically.
    """
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
    task: LayerTask, allocation: Allocation, W: Tensor, statistics: Statistics
) -> tuple[dict[str, float], float]:
    """Return the squared error of quantizing a weight to each scheme, and that of removing it."""
    assert statistics.inputs is not None
    assert task.quantize is not None
    damping = {"damp": task.options["damp"], "gradient_damp": task.options["gradient_damp"]}
    metric, _ = damped_metric(statistics.inputs, statistics.gradients, **damping)
    H, factor = statistics.inputs.whole(), QUANTIZER_ERROR[task.quantize.quantizer]
    errors = {}
    for args in allocation.quantization:
        if args.divides(task.shape[1]):
            W_hat = round_to_nearest(W, args, dtype=W.dtype, H=H).weight()
            errors[str(args)] = float(metric.energy(W.double() - W_hat)) * factor
    return errors, float(metric.energy(W.double()))
