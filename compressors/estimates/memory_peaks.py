"""Peak memory of the stages of a run, above what the process uses before its work.

The constants count tensors that exist at once in the code that they name. They were checked against
the peaks of runs on a CPU and on a GPU, see BENCHMARKS.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lrc.compressors.calibrate.calibration_passes import HEAD_TENSORS
from lrc.compressors.calibrate.segments import VALUE_BYTES
from lrc.compressors.calibrate.sequential_calibration import EXPERT_BYTES
from lrc.compressors.checkpoint.writer import MAX_SHARD_BYTES, reading_threads
from lrc.compressors.estimates.buffers import Buffers
from lrc.compressors.estimates.workload import Workload, numbers, sides
from lrc.compressors.evaluate.agreement import PIECE_LOGITS
from lrc.compressors.io.background_writes import BYTES, DEVICE_TYPES
from lrc.compressors.methods.base import LOW_RANK_TYPES, FixedSizeMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.plan import TrainingRecord
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.size import MIB

READING = 2.5
"""Copies of a tensor in the dtype of its file while it is read and checked for numbers."""
FORWARD_WIDTHS, FORWARD_STATES = 4, 4
"""Tensors of the width of the widest linear, and of the width of the stream, in a forward pass."""
COMPARED = 9
"""Tensors of `PIECE_LOGITS` while two models are compared."""
DOUBLE = 8
ROUNDING = 4
"""Copies in double precision of a matrix that is rounded to nearest."""
PINNED = 1.25
"""Pinned memory of results over their size: PyTorch rounds it up to a power of two for each tensor.
So much for the moments of layers of Llama shapes."""
LOADED = 2
"""Copies of statistics while they are read: the pages of the file, and the tensor."""
OVERHEAD = 100 * MIB
"""Host memory that grows with the first calls of libraries: buffers, code and pages kept by the
allocator."""


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs on the device that computes, and on the host if that is a GPU."""

    device: int
    host: int = 0


def memory_peaks(
    work: Workload, buffers: Mapping[str, Buffers], free: int
) -> dict[str, tuple[int, int]]:
    """Return the memory of the host and of the GPU that every stage needs at its peak.

    Parameters
    ----------
    work : Workload
    buffers : mapping of str to Buffers
        Of the stages that have any.
    free : int
        Free memory of the device, which decides whether models are evaluated layer by layer.
    """
    needs: dict[str, Need] = {}
    plan, on_gpu = work.plan, work.kind == "cuda"
    if work.prepared.source.gguf is not None:
        shard = min(plan.dense_bytes, MAX_SHARD_BYTES)
        needs["convert"] = Need(0, shard + VALUE_BYTES * work.embedding)
    if plan.slices:
        needs["slice"] = Need(_passes(work, sums=0) + 6 * DOUBLE * work.width**2, _layer_file(work))
    if work.statistics:
        sums = max(work.statistics_bytes)
        host = max(2 * sums, _waiting(work, sums))
        needs["calibrate"] = Need(max(_passes(work, sums), _backward(work, sums)), host)
    if any(task.pending for task in work.tasks):
        needs["allocate"] = Need(_largest_solution(work), _largest_moments(work))
    if work.tasks:
        computing = _largest_solution(work)
        if work.compensated:
            widest = max(linear.d_in for each in work.linears for linear in each.values())
            sums = max(VALUE_BYTES * 3 * widest**2, _expert_moments(work))
            computing = max(
                _passes(work, sums, models=2), max(computing, _largest_refit(work)) + sums
            )
        results = max(work.results)
        host = LOADED * _largest_moments(work) + max(results, _waiting(work, results))
        needs["compress"] = Need(computing, host)
    training = max((_training(work, record) for record in plan.training), default=0)
    if training:
        needs["heal"] = Need(training)
    # A shard, and the mapped pages of the tensors of it that are being read.
    shard = min(MAX_SHARD_BYTES, plan.compressed_bytes)
    reading = reading_threads() * work.itemsize * max(work.embedding, work.heads)
    needs["save"] = Need(0, shard + min(shard, reading))
    if work.evaluate.scores_models or work.compares:
        needs["evaluate"] = _evaluation(work, free)
    found = {}
    for stage, need in needs.items():
        placed = buffers.get(stage, Buffers(0, 0))
        if on_gpu:
            found[stage] = OVERHEAD + need.host + placed.host, need.device + placed.gpu
        else:
            found[stage] = OVERHEAD + max(need.host, need.device) + placed.host, 0
    return found


def _waiting(work: Workload, result: int) -> int:
    """Return the host memory of the results of layers that wait to be written; 0 on a CPU."""
    if work.kind not in DEVICE_TYPES or not result:
        return 0
    return int(PINNED * result * max(1, min(len(work.layers), BYTES // result)))


def _layer_file(work: Workload) -> int:
    return work.itemsize * max(work.layers, default=0)


def _activations(work: Workload) -> int:
    """Return the bytes of the activations of a layer for a batch."""
    widest = max(linear.d_out for each in work.linears for linear in each.values())
    return 4 * work.batch * (FORWARD_STATES * work.width + FORWARD_WIDTHS * widest)


def _ends(work: Workload, *, head: bool) -> tuple[int, int]:
    """Return the bytes of the embeddings in float32, and those while they are read."""
    numbers = work.embedding + (work.heads if head else 0)
    largest = max(work.embedding, work.heads if head else 0)
    return 4 * numbers, int(READING * work.itemsize * largest)


def _passes(work: Workload, sums: int, models: int = 1) -> int:
    """Return the peak of a forward pass, in whose trace the embedding is in memory."""
    ends, reading = _ends(work, head=False)
    layer = 4 * max(work.layers) * models
    return max(ends + reading, ends + layer + _activations(work), layer + _activations(work) + sums)


def _backward(work: Workload, sums: int) -> int:
    """Return the peak of a backward pass, at the logits or in a layer."""
    if not work.differentiates:
        return 0
    ends, reading = _ends(work, head=True)
    logits = 4 * work.head_batch * work.vocabulary * HEAD_TENSORS
    kept = work.batch * work.backward_bytes
    return max(ends + reading, ends + logits, 4 * max(work.layers) + kept + sums)


def _moments(work: Workload, task: LayerTask) -> int:
    """Return the bytes of a task's statistics in float32."""
    d_out, d_in = task.stacked_shape
    inputs, gradients = "inputs" in task.statistics, "gradients" in task.statistics
    whole = any(name.startswith("whole_") for name in task.statistics)
    near = d_in if whole else min(d_out, d_in)
    far = d_out if whole else min(d_out, d_in)
    return VALUE_BYTES * (inputs * near**2 + gradients * far**2)


def _expert_moments(work: Workload) -> int:
    """Return the bytes of the moments of compensated experts, which are summed for many at once.

    The sums of a batch exist next to those of the batches before.
    """
    sizes = [(n, 2 * VALUE_BYTES * d_in**2) for (_, d_in), n in work.compensated_experts.items()]
    return 2 * max((max(min(n * size, EXPERT_BYTES), size) for n, size in sizes), default=0)


def _largest_moments(work: Workload) -> int:
    return max((_moments(work, task) for task in work.tasks), default=0)


def _solution(work: Workload, task: LayerTask) -> int:
    """Return the bytes of a task while it is solved, in float64."""
    short, _ = sides(task)
    matrix, moments = DOUBLE * numbers(task), _moments(work, task)
    twice = DOUBLE // VALUE_BYTES * moments
    method = METHODS[task.method]
    allocation = None if task.allocation is None else work.plan.allocations[task.allocation]
    wanted = (task.config.types,) if allocation is None else allocation.types
    found = [0]
    for types, part in method.parts.items():
        if types not in wanted:
            continue
        if isinstance(part, FixedSizeMethod):
            found.append(8 * matrix + 3 * twice)
        elif {types} & {*LOW_RANK_TYPES}:
            found.append(3 * matrix + twice + 6 * DOUBLE * short**2)
    if task.quantize is not None:
        square = DOUBLE * task.stacked_shape[1] ** 2
        found.append(max(2 * matrix + 3 * square, 7 * matrix + square))  # the factor, the descent
    return max(found) + moments


def _largest_solution(work: Workload) -> int:
    return max((_solution(work, task) for task in work.tasks), default=0)


def _largest_refit(work: Workload) -> int:
    """Return the bytes of a weight that is refitted: its moment, a factor, and three matrices."""
    return max(
        2 * DOUBLE * task.stacked_shape[1] ** 2 + 3 * DOUBLE * numbers(task)
        for task in work.compensated
    )


def _training(work: Workload, record: TrainingRecord) -> int:
    """Return the memory of a stage that trains the whole model, without activations.

    In float32: the dense model, the compressed one and, for each number that is trained, a
    gradient, two averages and the best value.
    """
    if record.method == "block":
        return 0  # hidden states and one layer, as in calibration
    plan = work.plan
    few = record.options.get("train", "scales") in ("scales", "norms")
    # Where masks change, all entries of a matrix are trained.
    moves = record.options.get("support") == "moving"
    trained = 0 if few else plan.dense_parameters if moves else plan.compressed_parameters
    return 4 * (plan.dense_parameters + plan.compressed_parameters + 4 * trained)


def _evaluation(work: Workload, free: int) -> Need:
    """Return the memory of the models to evaluate, and of the logits that are compared."""
    sizes, itemsize = work.model_bytes, work.model_itemsize
    compared = 4 * PIECE_LOGITS * COMPARED if work.compares else 0
    window = max((spec.window for spec in work.evaluate.perplexity), default=0)
    widest = max(linear.d_out for each in work.linears for linear in each.values())
    running = itemsize * window * (FORWARD_STATES * work.width + FORWARD_WIDTHS * widest)
    running += compared
    if work.streams(free):
        # The embedding, the layers and the heads are in memory in turn; the next layer is read
        # while one computes, and the heads of two models are compared.
        layers = 2 * itemsize * max(work.dense_layers)
        if work.evaluate.baselines:
            largest = max(one.d_out * one.d_in for each in work.linears for one in each.values())
            layers += ROUNDING * DOUBLE * largest
        heads = itemsize * (work.heads or work.embedding) * (2 if work.compares else 1)
        parts = itemsize * work.embedding, layers, heads
        return Need(max(parts) + running, work.itemsize * work.embedding)
    # While a model is loaded on a CPU, the pages of its file are in memory too.
    loading = [sizes.dense + work.plan.dense_bytes, sizes.dense + running]
    if work.compares:
        loading.append(sizes.both + max(work.plan.compressed_bytes, running))
    if work.kind == "cpu":
        return Need(max(loading))
    return Need(max(sizes.both if work.compares else sizes.dense, 0) + running, MAX_SHARD_BYTES)
