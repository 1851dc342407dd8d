"""Peak memory of the stages of a run, above what the process uses before its work.

The constants count tensors that exist at once in the code that they name, see `solver_memory`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lrc.compressors.calibrate.batch_size import ATTENTION, batch_tokens
from lrc.compressors.calibrate.segments import VALUE_BYTES
from lrc.compressors.calibrate.sequential_calibration import EXPERT_BYTES
from lrc.compressors.checkpoint.writer import MAX_SHARD_BYTES
from lrc.compressors.estimates.buffers import Buffers
from lrc.compressors.estimates.solver_memory import (
    DOUBLE,
    largest_curve,
    largest_moments,
    largest_refit,
    largest_solution,
    sums_of_inputs,
)
from lrc.compressors.estimates.workload import Workload
from lrc.compressors.evaluate.agreement import PIECE_LOGITS
from lrc.compressors.heal.adapter_kinds import ADAPTERS
from lrc.compressors.io.background_writes import BYTES, DEVICE_TYPES, THREADS
from lrc.compressors.layers import COMPONENTS
from lrc.compressors.layers.assembled import LARGEST_SIDE
from lrc.compressors.layers.masked_weight import MaskedWeight
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.planning.plan import TrainingRecord
from lrc.compressors.solvers.quantized_matrix import NUMBERS
from lrc.configs.size import MIB

FORWARD_WIDTHS, FORWARD_STATES = 4, 4
"""Tensors of the width of the widest linear, and of the width of the stream, in a forward pass."""
LOGIT_TENSORS = 4
"""Tensors of the size of the logits while their gradient is taken: the logits, their softmax,
Gaussian numbers, and square roots of the softmax."""
COMPARED = 5
"""Tensors of `PIECE_LOGITS` in float32 while two models are compared: log-probabilities of both,
and three of their divergence. The logits of both, in the precision of the models, exist too."""
ROUNDING = 4
"""Copies in double precision of a piece of a matrix that is rounded to nearest."""
PINNED = 1.25
"""Pinned memory of results over their size: PyTorch rounds it up to a power of two for each tensor.
So much for the moments of layers of Llama shapes."""
LOADED = 2
"""Copies of statistics while they are read: the pages of the file, and the tensor."""
OVERHEAD = {"cpu": 100 * MIB, "cuda": 600 * MIB}
"""Host memory that grows with the first calls of libraries: buffers, code and pages kept by the
allocator. With CUDA also the kernels of cuBLAS, cuSOLVER and Triton, and pinned buffers for copies:
520 to 880 MiB in runs of a model of 113 MB on an H200."""
PLACE_BYTES = 4
"""Of the place of a stored value, and of the value of an entry."""
WORKSPACE = 32 * MIB
"""GPU memory that PyTorch gives cuBLAS for every stream that computes products, on a Hopper GPU;
others get 8 MiB. It is kept to the end of the process."""
STREAMS = 32
"""Streams that PyTorch has: every recording of `cuda_graphs` computes on another one."""
RECORDINGS = 2
"""Recordings of a quantization by columns, at least: of GPTQ, and of the coordinate descent."""


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs on the device that computes, and on the host if that is a GPU."""

    device: int
    host: int = 0


def memory_peaks(
    work: Workload,
    buffers: Mapping[str, Buffers],
    free: int,
    backlogs: Mapping[str, float] | None = None,
) -> dict[str, tuple[int, int]]:
    """Return the memory of the host and of the GPU that every stage needs at its peak.

    Parameters
    ----------
    work : Workload
    buffers : mapping of str to Buffers
        Of the stages that have any.
    free : int
        Free memory of the device, which decides whether models are evaluated layer by layer.
    backlogs : mapping of str to float, optional
        Part of the results of a stage that wait to be written at its end, see `write_backlogs`.
    """
    needs: dict[str, Need] = {}
    plan, on_gpu, backlogs = work.plan, work.kind == "cuda", backlogs or {}
    if work.prepared.source.gguf is not None:
        shard = min(plan.dense_bytes, MAX_SHARD_BYTES)
        needs["convert"] = Need(0, shard + VALUE_BYTES * work.embedding)
    if plan.slices:
        passes = _passes(work, sums=0) + 6 * DOUBLE * work.width**2
        needs["slice"] = Need(max(passes, _read(work, work.dense_embedding)), _layer_file(work))
    if work.statistics:
        # A pass through a layer has the sums of its inputs, or about as many of its gradients.
        passes = 2 if work.differentiates else 1
        sums, written = (max(each) // passes for each in (work.sum_bytes, work.statistics_bytes))
        host = _waiting(work, written, backlogs.get("calibrate", 0.0))
        needs["calibrate"] = Need(max(_passes(work, sums), _backward(work, sums)), host)
    if any(task.pending for task in work.tasks):
        needs["allocate"] = Need(largest_curve(work), largest_moments(work))
    if work.tasks:
        results = max(work.results)
        waiting = _waiting(work, results, backlogs.get("compress", 0.0))
        host = LOADED * largest_moments(work) + max(results, waiting)
        needs["compress"] = Need(max(largest_solution(work), _compensation(work)), host)
    training = max((_training(work, record) for record in plan.training), default=0)
    if training:
        needs["heal"] = Need(training)
    # A shard, and the pages of the file of its largest tensor while that is read.
    largest = work.itemsize * max(work.embedding, work.heads)
    shard = min(max(MAX_SHARD_BYTES, largest), plan.compressed_bytes)
    needs["save"] = Need(0, shard + min(shard, largest))
    if work.evaluate.scores_models or work.compares:
        needs["evaluate"] = _evaluation(work, free)
    overhead, found, workspaces = OVERHEAD[work.kind], {}, WORKSPACE
    for stage, need in needs.items():
        placed = buffers.get(stage, Buffers(0, 0))
        if not on_gpu:
            found[stage] = overhead + max(need.host, need.device) + placed.host, 0
            continue
        if stage == "compress":
            workspaces += WORKSPACE * min(STREAMS, RECORDINGS * work.columnwise)
        gpu = workspaces + need.device + placed.gpu if need.device else workspaces
        found[stage] = overhead + need.host + placed.host, gpu
    return found


def _waiting(work: Workload, result: int, backlog: float) -> int:
    """Return the host memory of the results of layers that wait to be written; 0 on a CPU."""
    if work.kind not in DEVICE_TYPES or not result:
        return 0
    number = max(THREADS, round(backlog * len(work.layers)))
    return int(PINNED * result * max(1, min(len(work.layers), BYTES // result, number)))


def _layer_file(work: Workload) -> int:
    return work.itemsize * max(work.layers, default=0)


def _read(work: Workload, number: int) -> int:
    """Return the bytes of a matrix while it is converted to float32 after it has been read."""
    return (work.itemsize + VALUE_BYTES) * number


def _layer(work: Workload, models: int = 1) -> int:
    """Return the bytes of a layer of `models` models, and of the next one that is read ahead."""
    largest = max(work.layers)
    ahead = work.itemsize * largest if work.kind in DEVICE_TYPES else 0
    return VALUE_BYTES * models * largest + ahead


def _activations(work: Workload) -> int:
    """Return the bytes of the activations of a layer for a batch, at the attention or after it."""
    widest = FORWARD_WIDTHS * work.widest
    if work.kind == "cuda":  # which has no fused attention for these heads in float32
        widest = max(widest, ATTENTION * work.attention_heads * work.calibration.window)
    return VALUE_BYTES * work.batch * (FORWARD_STATES * work.width + widest)


def _passes(work: Workload, sums: int) -> int:
    """Return the peak of a forward pass, before which the embedding is read."""
    traced = 0
    if not work.architecture.plain_layers:  # run next to the embedding, to record their calls
        traced = VALUE_BYTES * work.embedding + _layer(work) + _activations(work)
    return max(_read(work, work.embedding), traced, _layer(work) + _activations(work) + sums)


def _backward(work: Workload, sums: int) -> int:
    """Return the peak of a backward pass, at the logits or in a layer."""
    if not work.differentiates:
        return 0
    embedding = VALUE_BYTES * work.embedding
    head = work.heads or work.embedding  # one that is tied is read again
    logits = VALUE_BYTES * (head + LOGIT_TENSORS * work.head_batch * work.vocabulary)
    at_logits = embedding + max(_read(work, head), logits)
    return max(at_logits, _layer(work) + work.batch * work.backward_bytes + sums)


def _compensation(work: Workload) -> int:
    """Return the peak while weights are compensated, with a layer of the compressed model."""
    if not work.compensated:
        return 0
    sums = max(sums_of_inputs(task) for task in work.compensated)
    sums = max(2 * sums, _expert_moments(work))  # those of a batch, and of the batches before
    measuring = _layer(work, models=2) + _activations(work) + sums
    fitting = _layer(work) + largest_refit(work)
    return max(_read(work, work.embedding), measuring, fitting)


def _expert_moments(work: Workload) -> int:
    """Return the bytes of the moments of compensated experts, which are summed for many at once.

    The sums of a batch exist next to those of the batches before.
    """
    sizes = [(n, 2 * VALUE_BYTES * d_in**2) for (_, d_in), n in work.compensated_experts.items()]
    return 2 * max((max(min(n * size, EXPERT_BYTES), size) for n, size in sizes), default=0)


def _training(work: Workload, record: TrainingRecord) -> int:
    """Return the memory of a stage that trains the whole model, without activations.

    The dense model, the compressed one and, in float32 for each number that is trained, a gradient,
    two averages and the best value; and the number itself if the compressed model is in 16 bits.
    Masked layers keep the places of their values, and small factors the matrices that they make.
    """
    if record.method == "block":
        return 0  # hidden states and one layer, as in calibration
    plan = work.plan
    few = record.options.get("train", "scales") in ("scales", "norms", *ADAPTERS)
    # Where masks change, all entries of a matrix are trained.
    moves = record.options.get("support") == "moving"
    trained = 0 if few else plan.dense_parameters if moves else plan.compressed_parameters
    adapted = record.options.get("train") in ADAPTERS
    exact = adapted or work.prepared.source.dtype != torch.bfloat16
    itemsize = VALUE_BYTES if exact else work.model_itemsize
    models = work.model_itemsize * plan.dense_parameters + itemsize * plan.compressed_parameters
    numbers = models + VALUE_BYTES * (4 if itemsize == VALUE_BYTES else 5) * trained
    return numbers + (0 if few else _kept_for_gradients(work, itemsize))


def _kept_for_gradients(work: Workload, itemsize: int) -> int:
    """Return the bytes of places of values, and on a GPU of matrices made of small factors."""
    kept = 0
    for config in work.plan.modules().values():
        entries = math.prod(config.shape)
        for each in config.components:
            if issubclass(COMPONENTS[each.type], MaskedWeight):
                values = COMPONENTS[each.type].tensors(*config.shape, each)["values"].shape
                kept += PLACE_BYTES * (entries + math.prod(values))
            elif each.type in LOW_RANK_TYPES and min(config.shape) <= LARGEST_SIDE:
                kept += itemsize * entries * (work.kind == "cuda")
    return kept


def _evaluation(work: Workload, free: int) -> Need:
    """Return the memory of the models to evaluate, and of the logits that are compared."""
    sizes, itemsize = work.model_bytes, work.model_itemsize
    window = max((spec.window for spec in work.evaluate.perplexity), default=0)
    running = itemsize * window * (FORWARD_STATES * work.width + FORWARD_WIDTHS * work.widest)
    compared = (VALUE_BYTES * COMPARED + 2 * itemsize) * PIECE_LOGITS if work.compares else 0
    if work.streams(free):
        # The embedding, the layers and the heads are in memory in turn; the next layer is read
        # while one computes, and the heads of two models are compared.
        layers = 2 * itemsize * max(work.dense_layers) + running * _windows(work, window)
        if work.evaluate.baselines:  # made of a copy of the layer, a piece of a matrix at a time
            layers += itemsize * max(work.dense_layers)
            layers += ROUNDING * DOUBLE * min(work.largest, NUMBERS)
        heads = itemsize * (work.heads or work.embedding) * (2 if work.compares else 1)
        parts = _read_as(work, work.embedding), layers, heads + compared
        return Need(max(parts), work.itemsize * work.embedding)
    running += compared
    # While a model is loaded, the pages of its file are in memory too.
    loading = [sizes.dense + work.plan.dense_bytes, sizes.dense + running]
    if work.compares:
        loading.append(sizes.both + max(work.plan.compressed_bytes, running))
    if work.kind == "cpu":
        return Need(max(loading))
    return Need((sizes.both if work.compares else sizes.dense) + running, work.largest_file)


def _read_as(work: Workload, number: int) -> int:
    """Return the bytes of a matrix while it is read in the precision of the models."""
    same = work.model_itemsize == work.itemsize
    return work.itemsize * number if same else _read(work, number)


def _windows(work: Workload, window: int) -> int:
    """Return the number of windows of the evaluation in a batch."""
    number = max((spec.windows or 0 for spec in work.evaluate.perplexity), default=0)
    if not window or not number:
        return 1
    return max(1, batch_tokens(work.prepared.dense, work.kind, number, window) // window)
