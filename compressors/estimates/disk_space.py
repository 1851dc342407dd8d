"""Peak disk space of a run, by stage."""

from collections.abc import Mapping
from itertools import accumulate

from lrc.compressors.calibrate.activation_cache import SNAPSHOT_SECONDS
from lrc.compressors.estimates.buffers import Buffers
from lrc.compressors.estimates.workload import Workload, numbers
from lrc.compressors.heal.adapter_kinds import ADAPTERS
from lrc.compressors.heal.work import SNAPSHOT_SECONDS as TRAINING_SECONDS
from lrc.compressors.planning.plan import TrainingRecord
from lrc.compressors.planning.tasks import LayerTask

TOKENIZER = 40
"""Bytes of a tokenizer's files per entry of the vocabulary, twice: of tokens and of merges."""

STATE_BYTES = 14
"""Of a number that is trained, in a snapshot: its value and two averages in float32, and its best
value in 16 bits."""

PENDING_GROUP = 32
"""Numbers that share a scale, where an allocator has yet to choose."""


def disk_space(
    work: Workload, buffers: Mapping[str, Buffers], seconds: Mapping[str, float]
) -> dict[str, int]:
    """Return the largest size of the output folder during every stage.

    Parameters
    ----------
    work : Workload
    buffers : mapping of str to Buffers
        Of the stages that have any.
    seconds : mapping of str to float
        Of the stages: hidden states are saved from time to time.
    """
    plan, found = work.plan, {}
    # Slicing is not divided.
    sizes = {stage: each.disk for stage, each in buffers.items()}
    on_disk = {n: size * (1 if n == "slice" else work.processes) for n, size in sizes.items()}
    kept = plan.dense_bytes if work.prepared.source.gguf is not None else 0
    if kept:
        found["convert"] = kept
    kept += 8 * work.tokens  # the windows
    if plan.slices:
        for record in plan.slices:
            kept += record.bytes[1]
        found["slice"] = kept + on_disk.get("slice", 0) + _snapshots(work, seconds["slice"])
    statistics, results = work.statistics_bytes, work.results
    total, calibrating = sum(statistics), on_disk.get("calibrate", 0)
    if work.segments is not None:  # collected by the stages that use them
        total, statistics = work.segments.bytes + calibrating, [0] * len(statistics)
    elif work.statistics:
        saved = _snapshots(work, seconds["calibrate"])
        found["calibrate"] = kept + total + calibrating + saved
    curves = sum(8 * min(task.stacked_shape) for task in work.tasks if task.pending)
    if curves:
        found["allocate"] = kept + total + curves
    kept += curves
    if work.tasks:
        # A layer's statistics are deleted after its results have been written.
        left = [total, *(total - done for done in accumulate(statistics))]
        written = accumulate(results)
        peak = max(a + b for a, b in zip(left, written, strict=False))
        if work.processes > 1 and not work.compensated:  # deleted when all layers are finished
            peak = total + sum(results)
        found["compress"] = kept + peak + on_disk.get("compress", 0)
    kept += sum(results)
    for training in plan.training:
        state, stored = _trained(work, training)
        copies = min(2, int(seconds.get("heal", 0.0) / TRAINING_SECONDS))
        found["heal"] = max(found.get("heal", 0), kept + stored + copies * state)
        kept += stored
    kept += plan.compressed_bytes + TOKENIZER * 2 * work.vocabulary
    # The hidden states of compensation are deleted after the checkpoint has been written.
    found["save"] = kept + on_disk.get("compress", 0)
    if work.evaluate.perplexity:
        found["evaluate"] = kept + on_disk.get("evaluate", 0)
    return found


def _trained(work: Workload, record: TrainingRecord) -> tuple[int, int]:
    """Return the bytes of a snapshot of training, and of the trained numbers in 16 bits."""
    if record.method == "block":  # a layer at a time
        return STATE_BYTES * max(work.results, default=0) // 2, sum(work.results)
    train = record.options.get("train", "scales")
    if train in ("scales", "norms"):
        count = sum(_scales(task) for task in work.tasks)
    elif train in ADAPTERS:
        count = record.added_bytes // 2
    elif train == "all":
        count = work.plan.compressed_parameters - work.embedding - work.heads
    else:
        count = sum(work.results) // 2
    if record.options.get("support") == "moving":  # all entries of a matrix are trained
        count = sum(work.layers)
    return STATE_BYTES * count, 2 * count


def _scales(task: LayerTask) -> int:
    """Return the number of scales of a task; of small groups where the groups are not known yet."""
    if task.quantize is None:
        return 0
    args = task.quantize.args
    group = PENDING_GROUP if args is None else args.group_size or task.stacked_shape[1]
    return numbers(task) // group


def _snapshots(work: Workload, seconds: float) -> int:
    """Return the size of the saved hidden states: two copies while they are replaced."""
    if work.processes > 1:
        return 0
    return work.states * min(2, int(seconds / SNAPSHOT_SECONDS))
