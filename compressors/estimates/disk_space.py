"""Peak disk space of a run, by stage."""

from collections.abc import Mapping
from itertools import accumulate

from lrc.compressors.calibrate.activation_cache import SNAPSHOT_SECONDS
from lrc.compressors.estimates.buffers import Buffers
from lrc.compressors.estimates.workload import Workload

TOKENIZER = 40
"""Bytes of a tokenizer's files per entry of the vocabulary, twice: of tokens and of merges."""


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
        # The best values so far, and the state of the optimizer: two averages.
        trained = plan.compressed_bytes if training.method != "block" else max(results, default=0)
        found["heal"] = kept + 6 * trained
        kept += trained
    kept += plan.compressed_bytes + TOKENIZER * 2 * work.vocabulary
    # The hidden states of compensation are deleted after the checkpoint has been written.
    found["save"] = kept + on_disk.get("compress", 0)
    if work.evaluate.perplexity:
        found["evaluate"] = kept + on_disk.get("evaluate", 0)
    return found


def _snapshots(work: Workload, seconds: float) -> int:
    """Return the size of the saved hidden states: two copies while they are replaced."""
    if work.processes > 1:
        return 0
    return work.states * min(2, int(seconds / SNAPSHOT_SECONDS))
