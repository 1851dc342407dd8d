"""Seconds that the stages of a run take, from counted work and the speed of the machine.

The constants count passes and products in the code that they name, or were measured.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter

from lrc.compressors.calibrate.calibration_passes import HEAD_TENSORS
from lrc.compressors.calibrate.segments import VALUE_BYTES
from lrc.compressors.calibrate.sequential_calibration import EXPERT_BYTES
from lrc.compressors.checkpoint.writer import MAX_SHARD_BYTES
from lrc.compressors.compress.layerwise import relative_cost
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.estimates.fixed_size_work import curve_seconds, solution_seconds
from lrc.compressors.estimates.machine_rates import EFFICIENCY, MachineRates, dequantizing_rate
from lrc.compressors.estimates.training_seconds import training_seconds
from lrc.compressors.estimates.workload import Workload, numbers, sides
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.slicing import METHODS as SLICERS
from lrc.compressors.solvers.quantization_grid import RANGES
from lrc.configs.slice import Slice, SliceBase

SLICE_OPTIONS: TypeAdapter[SliceBase] = TypeAdapter(Slice)
ELEMENTWISE = 60
"""Elementwise operations on hidden states in a layer: norms, rotary embedding, activations."""
BACKWARD_PASSES = 3
"""A backward pass repeats the forward pass and takes two more for the gradients."""
COMPENSATION_PASSES = 5
"""Compensation runs dense and compressed layers up to the input of every group of linears, and the
compressed ones once more to advance; the dense ones advance with the last measurement."""
TRIANGLE = 1.25
"""Time of the lower triangle of a symmetric product, relative to that of its multiplications in a
whole product (CPU)."""
VALUES_ONLY = 1 / 3
"""Time of eigenvalues alone, of that with their vectors."""
CODE_PASSES, CODE_STEPS = 8, 2900
"""GPTQ with coordinate descent takes as long as so many products of a matrix and its moment, and so
many elementwise operations on the matrix: fitted to seven shapes from 192 x 576 to 1024 x 3072."""
COLUMN_SECONDS = {"cpu": 0.0, "cuda": 1e-4}
"""GPTQ goes through a matrix column by column, and starts a few kernels for each."""
MATRIX_SECONDS = {"cpu": 0.0, "cuda": 0.01}
"""Time to solve the smallest matrix: its statistics are read from a file, copied to the GPU, and
solved by some dozens of operations there (H200)."""
READING_TEXT = 0.5
"""Seconds to read and tokenize a text."""
LOADING = {"cpu": 0.2, "cuda": 0.4}
"""Seconds to load a tokenizer and make a model, besides reading its weights; on a GPU, its first
operations start slowly, too."""
STARTING = {"cpu": 0.0, "cuda": 0.3}
"""Seconds until a GPU has loaded the libraries of a run."""


def stage_seconds(work: Workload, rates: MachineRates) -> dict[str, float]:
    """Return the seconds of every stage; tasks and text of unknown length are not included.

    `rates` are those of a process while all of them compute.
    """
    plan, seconds = work.plan, dict[str, float]()
    if work.stored_type is not None:
        rate = dequantizing_rate(work.stored_type)
        seconds["convert"] = plan.dense_bytes / rates.disk + plan.dense_parameters / rate
    if plan.slices:
        once = _forward(work, rates, work.dense_layers, share=1.0)  # by one process
        seconds["slice"] = once * sum(
            SLICERS[record.method].passes(SLICE_OPTIONS.validate_python(record.options), config)
            for record, config in zip(plan.slices, work.prepared.sliced, strict=True)
        )
        seconds["slice"] += sum(record.bytes[1] for record in plan.slices) / rates.disk
    calibration = _calibration(work, rates) if work.statistics else 0.0
    if work.statistics and work.segments is None:
        seconds["calibrate"] = calibration
    pending = [task for task in work.pending if _low_rank(task)]
    curves = curve_seconds(work, rates)
    if pending or curves:
        seconds["allocate"] = curves + _reading(work.pending, work, rates)
        seconds["allocate"] += MATRIX_SECONDS[work.kind] * len(work.pending)
        seconds["allocate"] += sum(_spectrum(task, rates, values=True) for task in pending)
        seconds["allocate"] += _schemes(work, rates)
        seconds["allocate"] *= _layer_share(work)
    if work.tasks:
        solving = solution_seconds(work, rates) + _solutions(work, rates)
        solving += _reading(work.tasks, work, rates) + MATRIX_SECONDS[work.kind] * len(work.tasks)
        seconds["compress"] = solving * (
            _input_share(work) if work.compensated else _layer_share(work)
        )
        seconds["compress"] += sum(work.results) / rates.disk + _compensation(work, rates)
    if work.segments is not None:
        # Each stage collects what it uses.
        for stage in seconds.keys() & {"allocate", "compress"}:
            seconds[stage] += calibration
    if plan.training:
        seconds["heal"] = sum(training_seconds(work, rates, each) for each in plan.training)
    embeddings = sum(numbers(task) for task in plan.embeddings)
    if embeddings:  # by the first process
        rounded = embeddings / rates.rounding + work.itemsize * embeddings / rates.reading
        seconds["compress"] = seconds.get("compress", 0.0) + rounded
    files = work.share(math.ceil(plan.compressed_bytes / MAX_SHARD_BYTES))
    a_byte = 1 / rates.disk + 1 / rates.reading + 1 / rates.hashing
    seconds["save"] = files * plan.compressed_bytes * a_byte
    if work.scored_tokens:
        a_token = 2 * plan.dense_parameters / (EFFICIENCY * rates.model_products)
        a_token *= work.scored_share
        models = 1 + work.evaluate.dense
        loading = LOADING[work.kind] + plan.dense_bytes / rates.reading
        seconds["evaluate"] = a_token * (models * work.scored_tokens + 2 * work.compared_tokens)
        compared = 12 * work.compared_tokens * work.vocabulary * work.scored_share
        seconds["evaluate"] += compared / rates.elementwise
        seconds["evaluate"] += loading * (models + 2 * work.compares)
        if work.evaluate.baselines:
            number = len(work.evaluate.baselines)
            rounded = sum(numbers(task) for task in [*work.tasks, *plan.embeddings])
            a_baseline = loading + a_token * work.scored_tokens + rounded / rates.rounding
            seconds["baselines"] = number * a_baseline
    if work.tokens:
        first = next(stage for stage in ("slice", "calibrate", "compress") if stage in seconds)
        seconds[first] += READING_TEXT + STARTING[work.kind]
    return seconds


def _forward(
    work: Workload, rates: MachineRates, layers: list[int], share: float | None = None
) -> float:
    """Return the seconds of a pass of the calibration text through layers, and of the trace.

    Of a process with a `share` of the windows, by default of each of several.
    """
    share = work.window_share if share is None else share
    tokens, reading = work.tokens * share + work.batch, work.itemsize * sum(layers) / rates.reading
    operations = work.pass_operations(layers, work.calibration.window)
    products = operations / (EFFICIENCY * rates.products)
    elementwise = ELEMENTWISE * work.width * len(layers) / rates.elementwise
    return reading + tokens * (products + elementwise)


def _calibration(work: Workload, rates: MachineRates) -> float:
    tokens, n_layers = work.tokens * work.window_share, len(work.layers)
    seconds = _forward(work, rates, work.layers)
    seconds += 2 * tokens * TRIANGLE * work.sum_products / rates.products
    if work.differentiates:
        seconds += BACKWARD_PASSES * _forward(work, rates, work.layers)
        head = work.heads or work.embedding
        seconds += tokens * 3 * 2 * head / (EFFICIENCY * rates.products)
        # Gaussian numbers take as long as several other operations.
        seconds += 4 * HEAD_TENSORS * tokens * work.vocabulary / rates.elementwise
    # Of several processes, each starts a layer when the one before it has finished that layer.
    seconds *= (n_layers + work.processes - 1) / n_layers
    return seconds + sum(work.statistics_bytes) / rates.disk


def _layer_share(work: Workload) -> float:
    """Return the part of the solutions that a process has if layers are divided."""
    return work.share(len({task.layer for task in work.tasks}))


def _input_share(work: Workload) -> float:
    """Return the part that a process has if weights with the same input are divided.

    Those with rows of equal length in one module count as weights with the same input. Experts are
    divided together although their inputs differ, see `rounds`.
    """
    sharing: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    for task in work.tasks:
        parent, _, leaf = task.name.rpartition(".")
        if task.compensate is not None and task.compensate.routed:
            parent = f"{parent.rpartition('.')[0]}.{leaf}"
        sharing[task.layer, parent, task.stacked_shape[1]].append(relative_cost(task))
    processes = Processes(size=work.processes)
    longest = 0.0
    for costs in sharing.values():
        totals = [0.0] * work.processes
        for cost, owner in zip(costs, processes.owners(costs), strict=True):
            totals[owner] += cost
        longest += max(totals)
    return longest / sum(map(sum, sharing.values()))


def _reading(tasks: Sequence[LayerTask], work: Workload, rates: MachineRates) -> float:
    """Return the seconds to read the weights of tasks."""
    return work.itemsize * sum(map(numbers, tasks)) / rates.reading


def _schemes(work: Workload, rates: MachineRates) -> float:
    """Return the seconds to round weights to every scheme that an allocator may choose."""
    rounded = 0
    for task in work.pending:
        assert task.allocation is not None
        rounded += numbers(task) * len(work.plan.allocations[task.allocation].quantization)
    return len(RANGES) * rounded / rates.rounding


def _low_rank(task: LayerTask) -> bool:
    return bool({*METHODS[task.method].types} & {*LOW_RANK_TYPES})


def _spectrum(task: LayerTask, rates: MachineRates, *, values: bool) -> float:
    """Return the seconds to decompose a matrix under its metrics."""
    short, long = sides(task)
    eigen = rates.eigenvectors(short)
    products = 3 * short**3 + short**2 * long
    if any(name.startswith("whole_") for name in task.statistics):
        products += short * long**2
    if not values:
        products += 3 * short**2 * long
    return (VALUES_ONLY if values else 1.0) * eigen + 2 * products / rates.double_products


def _solutions(work: Workload, rates: MachineRates) -> float:
    """Return the seconds of all solutions, except those of fixed-size methods."""
    seconds = sum(_spectrum(task, rates, values=False) for task in work.tasks if _low_rank(task))
    for task in work.tasks:
        if task.quantize is not None and task.quantize.quantizer == "rtn":
            seconds += numbers(task) / rates.rounding
        elif task.quantize is not None:
            d_in = task.stacked_shape[1]
            products = CODE_PASSES * numbers(task) * d_in + d_in**3
            seconds += 2 * products / rates.double_products
            seconds += CODE_STEPS * numbers(task) / rates.elementwise
            seconds += len(task.weights) * d_in * COLUMN_SECONDS[work.kind]
    refits = sum(2 * numbers(t) * t.shape[1] + t.shape[1] ** 3 for t in work.compensated)
    return seconds + 2 * refits / rates.double_products


def _compensation(work: Workload, rates: MachineRates) -> float:
    """Return the seconds of what passes through the model while weights are compensated."""
    if not work.compensated:
        return 0.0
    tokens = work.tokens * work.window_share
    inputs = {
        (w.layer, task.shape[1])
        for task in work.compensated
        for w in task.weights
        if task.compensate is not None and not task.compensate.routed
    }
    squares = sum(width**2 for _, width in inputs)
    passes = float(COMPENSATION_PASSES)
    for (_, width), number in work.compensated_experts.items():
        # All experts together have as many inputs as the token has experts.
        squares += width**2 * work.experts_of_token
        together = max(1, EXPERT_BYTES // (2 * VALUE_BYTES * width**2))
        # The first pass of both models is one of those of a dense layer.
        passes += 2 * (math.ceil(number / together) - 1) / len(work.layers)
    products = 2 * (TRIANGLE / 2 + 1) * tokens * squares / rates.products
    return passes * _forward(work, rates, work.layers) + products


def write_backlogs(
    work: Workload, rates: MachineRates, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Return the part of a stage's results that wait at its end, if writing takes longer than it.

    On a GPU, results are written while the next ones are computed.
    """
    found = {}
    written = {"calibrate": sum(work.statistics_bytes), "compress": sum(work.results)}
    for stage, n_bytes in written.items():
        if stage in seconds and n_bytes:
            writing = n_bytes / rates.disk
            computing = seconds[stage] - writing  # `seconds` has both, one after the other
            found[stage] = max(0.0, 1 - computing / writing)
    return found
