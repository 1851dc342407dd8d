"""Estimate time, memory and disk space of a plan from shapes and two short measurements.

Estimates are within about a factor of two on an idle machine. A matrix product and a symmetric
eigenproblem are timed on the device that will be used, for a fraction of a second.
"""

import time
from dataclasses import dataclass

import psutil
import torch
from pydantic import TypeAdapter

from lrc.compressors.evaluate.side_by_side import unmeasured_pair
from lrc.compressors.evaluate.streaming_rule import ModelBytes, streams
from lrc.compressors.io.machine import free_memory
from lrc.compressors.methods.base import LOW_RANK_TYPES, FixedSizeMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import Plan, TrainingRecord
from lrc.compressors.planning.rate_distortion import size_families
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.prepare import Prepared
from lrc.compressors.slicing import METHODS as SLICERS
from lrc.configs.recipe import Calibration
from lrc.configs.slice import Slice, SliceBase

SLICE_OPTIONS: TypeAdapter[SliceBase] = TypeAdapter(Slice)
PROBE = 512
# In forward passes over the layers: a backward pass repeats the forward pass and takes two more for
# the gradients; compensation runs dense and compressed layers, once to measure every group of an
# attention or MLP block, and once to advance.
BACKWARD_PASSES, COMPENSATION_PASSES = 3, 5
# Eigenvalues alone take about a third of what they take with their vectors.
VALUES_ONLY = 1 / 3
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Seconds per stage, and peaks in bytes; what depends on unread data is not included."""

    seconds: dict[str, float]
    memory_bytes: int
    disk_bytes: int
    not_estimated: list[str]


def estimate(prepared: Prepared, device: str) -> Estimate:
    """Estimate a run on `device`."""
    plan, evaluate = prepared.plan, prepared.recipe.evaluate
    calibration = Calibration.model_validate(plan.calibration)
    products, eigenproblems = _probe(device)
    in_layers = sum(m.numel() for layer in prepared.architecture.layers for m in layer.parameters())
    in_dense = sum(m.numel() for layer in prepared.dense.layers for m in layer.parameters())
    n_layers = len(prepared.architecture.layers)
    tasks = [task for task in plan.tasks if task.compressed]
    measured = [(w.name, task) for task in tasks if task.statistics for w in task.weights]
    # Linear layers of one module with the same input width usually share their input.
    inputs = {
        (name.rpartition(".")[0], task.shape[1])
        for name, task in measured
        if "inputs" in task.statistics
    }
    gram = sum(width**2 for _, width in inputs)
    outputs = sum(task.shape[0] ** 2 for _, task in measured if "gradients" in task.statistics)
    backward = any({"gradients", "row_fisher"} & {*task.statistics} for _, task in measured)
    compensates = any(task.compensate is not None for task in plan.tasks)
    reads = measured or compensates or plan.slices
    tokens = calibration.samples * calibration.window if reads else 0

    seconds = {}
    if plan.slices:
        seconds["slice"] = tokens * 2 * in_dense / products
        seconds["slice"] *= sum(
            SLICERS[record.method].passes(SLICE_OPTIONS.validate_python(record.options), config)
            for record, config in zip(plan.slices, prepared.sliced, strict=True)
        )
    if measured:
        passes = 1 + (BACKWARD_PASSES if backward else 0)
        seconds["calibrate"] = tokens * 2 * (passes * in_layers + gram + outputs) / products
    curves, solutions = fixed_size_flops(plan)
    spectral = [
        t for t in tasks for _ in t.weights if {*METHODS[t.method].types} & {*LOW_RANK_TYPES}
    ]
    pending = [min(task.shape) for task in spectral if task.pending]
    if pending or curves:
        spectra = VALUES_ONLY * sum(s**3 / eigenproblems for s in pending)
        seconds["allocate"] = spectra + 2 * curves / products
    if tasks:
        small = [(min(task.shape), max(task.shape)) for task in spectral]
        seconds["compress"] = sum(s**3 / eigenproblems for s, _ in small) + sum(
            2 * s * b * (s + b) / (products / 2) for s, b in small
        )
        seconds["compress"] += 2 * solutions / products
    if compensates:
        seconds["compress"] += COMPENSATION_PASSES * tokens * 2 * in_layers / products
    if plan.training:
        work = sum(record.passes * (record.tokens or 0) for record in plan.training)
        seconds["heal"] = work * 2 * in_layers / products
        seconds["heal"] += sum(60 * (record.minutes or 0) for record in plan.training)
    seconds["save"] = plan.compressed_bytes / 0.5e9
    scored = sum(s.windows * s.window for s in evaluate.perplexity if s.windows)
    not_estimated = [
        f"perplexity on the whole of {spec.name}"
        for spec in evaluate.perplexity
        if not spec.windows
    ]
    not_estimated += [f"task {name}" for name in evaluate.tasks.names]
    not_estimated += [f"task {evaluate.task.name}"] if evaluate.task else []
    if scored:
        models = 1 + evaluate.dense + len(evaluate.baselines)
        compared = sum(
            min(s.windows * s.window, max(evaluate.kl_tokens, s.window))
            for s in evaluate.compared_texts
            if s.windows
        )
        passes = models * scored + 2 * compared
        seconds["evaluate"] = passes * 2 * plan.dense_parameters / products

    hidden = _width(prepared) * tokens * 4
    layer = 4 * max(in_layers, in_dense) // n_layers
    statistics = 4 * (gram + outputs)
    whole = plan.dense_parameters * (4 if device == "cpu" else prepared.source.dtype.itemsize)
    evaluates = evaluate.scores_models
    limit = int(calibration.memory_limit_gib * GIB)
    calibrating = min(hidden, limit) + layer
    calibrating += 4 * max((w for _, w in inputs), default=0) ** 2 * 3
    training = max((_training_bytes(plan, record) for record in plan.training), default=0)
    now = psutil.Process().memory_info().rss
    converted = plan.dense_bytes if plan.model.source_quantized else 0
    converted += sum(record.bytes[1] for record in plan.slices)
    # Hidden states are replaced by writing new ones first.
    disk = statistics + 2 * hidden + plan.bits // 8 + plan.compressed_bytes + converted
    evaluating = whole if evaluates else 0
    sizes = ModelBytes(whole, plan.compressed_bytes)
    if unmeasured_pair(evaluate)["missing"]:
        evaluating = sizes.both
    if streams(evaluate, sizes, free_memory(device)):
        # Both heads, then one layer and a copy of it for a baseline, and the hidden states. Tasks
        # and generated text are left out, as what does not fit.
        states = 4 * _width(prepared) * scored * (1 + evaluate.dense + len(evaluate.baselines))
        ends = 4 * max(0, plan.dense_parameters - in_dense)
        evaluating = max(2 * layer, 2 * ends) + min(states, limit)
        disk += states if states > limit else 0
    memory = now + max(calibrating, evaluating, training, plan.compressed_bytes)
    return Estimate(seconds, memory, disk, not_estimated)


def _training_bytes(plan: Plan, record: TrainingRecord) -> int:
    """Return the memory of a stage that trains the whole model, without activations.

    In float32: the dense model, the compressed one and, for each number that is trained, a
    gradient, two averages and the best value.
    """
    if record.method == "block":
        return 0  # hidden states and one layer, as in calibration
    few = record.options.get("train", "scales") in ("scales", "norms")
    # Where masks change, all entries of a matrix are trained.
    moves = record.options.get("support") == "moving"
    trained = 0 if few else plan.dense_parameters if moves else plan.compressed_parameters
    return 4 * (plan.dense_parameters + plan.compressed_parameters + 4 * trained)


def fixed_size_flops(plan: Plan) -> tuple[int, int]:
    """Return the multiply-adds of fixed-size methods: for curves, and for the final solutions.

    Where an allocator has yet to choose, the most expensive components count.
    """
    curves = solutions = 0
    for task in plan.tasks:
        if not task.compressed:
            continue
        allocation = None if task.allocation is None else plan.allocations[task.allocation]
        wanted = (task.config.types,) if allocation is None else allocation.types
        largest = 0
        for types, part in METHODS[task.method].parts.items():
            if types not in wanted or not isinstance(part, FixedSizeMethod):
                continue
            options = part.select(task.options)
            families = size_families(task, types, allocation)
            if allocation is None:
                final = [sizes for _, found in families for sizes in found]
            else:
                looked_at = [sizes for _, found in families for sizes in found]
                curves += part.flops(*task.stacked_shape, looked_at, curve=True, **options)
                steps = SizeSteps(task, types, ratio=families[0][0].ratio)
                step = steps.within(task.bits / task.dense_bits, BITS)
                final = [steps.config(step).sizes] if step else []
            largest = max(largest, part.flops(*task.stacked_shape, final, curve=False, **options))
        solutions += largest
    return curves, solutions


def _width(prepared: Prepared) -> int:
    config = prepared.source.config.get_text_config()
    return int(getattr(config, "hidden_size", 0) or 0)


def _probe(device: str) -> tuple[float, float]:
    """Return float32 operations a second, and n^3 a second of a float64 eigenproblem."""
    a = torch.randn(2 * PROBE, 2 * PROBE, device=device)
    s = torch.randn(PROBE, PROBE, dtype=torch.float64, device=device)
    products = 2 * (2 * PROBE) ** 3 / _best_of(lambda: a @ a, device)
    eigenproblems = PROBE**3 / _best_of(lambda: torch.linalg.eigh(s + s.T), device)
    return products, eigenproblems


def _best_of(run: object, device: str, tries: int = 4) -> float:
    times = []
    for _ in range(tries):  # the first pays for start-up
        start = time.perf_counter()
        run()  # type: ignore[operator]
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
