"""Estimate memory, disk space and time of a run, and refuse what cannot fit.

Everything follows from shapes, the plan and the measured speed of the machine. Memory and disk are
within about 20 %, the time mostly within a factor of 1.5 on a machine that does nothing else.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lrc.compressors.calibrate.calibration_windows import SELF
from lrc.compressors.calibrate.segments import VALUE_BYTES
from lrc.compressors.estimates.buffers import Buffers
from lrc.compressors.estimates.disk_space import disk_space
from lrc.compressors.estimates.machine_rates import measure_rates
from lrc.compressors.estimates.memory_peaks import memory_peaks
from lrc.compressors.estimates.stage_seconds import stage_seconds, write_backlogs
from lrc.compressors.estimates.workload import Workload
from lrc.compressors.evaluate.generations import read_prompts
from lrc.compressors.io.disk_use import existing_folder, free_disk, used_disk
from lrc.compressors.io.freed_memory import trim
from lrc.compressors.io.machine import free_memory
from lrc.compressors.planning.problems import Problems
from lrc.compressors.prepare import Prepared
from lrc.configs.recipe import Recipe
from lrc.configs.size import GIB
from lrc.configs.sources import fractions

MARGIN = 1.2
"""An estimate of memory is refused only if it exceeds what is free by this factor."""


@dataclass(frozen=True)
class Estimate:
    """Estimated needs of every stage, without the parts of the run in `not_estimated`."""

    seconds: dict[str, float]
    host_bytes: dict[str, int]
    """Resident memory of the process at its peak."""
    gpu_bytes: dict[str, int]
    """Allocated memory of the GPU at its peak; empty on a CPU."""
    disk_bytes: dict[str, int]
    """Size of the output folder at its peak."""
    not_estimated: list[str]
    processes: int = 1
    """Number of processes; the memory is that of each."""

    @property
    def peak_host(self) -> int:
        """Peak of the whole run."""
        return max(self.host_bytes.values())

    @property
    def peak_gpu(self) -> int | None:
        """Peak of the whole run; None on a CPU."""
        return max(self.gpu_bytes.values(), default=None)

    @property
    def peak_disk(self) -> int:
        """Peak of the whole run."""
        return max(self.disk_bytes.values())

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: by stage, and the peaks."""
        peaks = {
            "host_bytes": self.peak_host,
            "gpu_bytes": self.peak_gpu,
            "disk_bytes": self.peak_disk,
        }
        return {**asdict(self), "peak": peaks}


def estimate(prepared: Prepared, device: str, processes: int = 1) -> Estimate:
    """Estimate a run on `device`, whose speed is measured at the first call.

    Each of several processes has a device like this one; on a CPU, they share its cores.
    """
    work = Workload(prepared, device, processes)
    dtype = torch.float32 if work.kind == "cpu" else prepared.source.dtype
    rates = measure_rates(device, dtype, existing_folder(Path(prepared.recipe.output).expanduser()))
    if work.kind == "cpu":
        rates = rates.shared(processes)
    free = free_memory(device)
    buffers = place_buffers(work, free)
    seconds = stage_seconds(work, rates)
    trim()  # of what the measurements have used
    now = psutil.Process().memory_info().rss
    peaks = memory_peaks(work, buffers, free, write_backlogs(work, rates, seconds))
    return Estimate(
        seconds=seconds,
        host_bytes={stage: now + host for stage, (host, _) in peaks.items()},
        gpu_bytes={s: gpu for s, (_, gpu) in peaks.items()} if work.kind == "cuda" else {},
        disk_bytes=disk_space(work, buffers, seconds),
        not_estimated=_not_estimated(work),
        processes=processes,
    )


def place_buffers(work: Workload, free: int) -> dict[str, Buffers]:
    """Return the buffers of hidden states of every stage, with `free` memory of the device."""
    gpu = free if work.kind == "cuda" else 0
    found: dict[str, Buffers] = {}
    if work.plan.slices:
        found["slice"] = Buffers(gpu, work.memory_limit)
        found["slice"].add(round(work.states / work.window_share))  # one process has all windows
    if work.statistics:
        calibrating = found["calibrate"] = Buffers(gpu, work.memory_limit)
        calibrating.add(work.states)
        if work.differentiates:
            calibrating.add(work.states)  # the gradients
            calibrating.add_checkpoints(work.checkpoints)
    if work.compensated:
        compressing = found["compress"] = Buffers(gpu, work.memory_limit // 2)
        compressing.add(work.states)
        compressing.add(work.states)
    if work.streams(free):
        models = 1 + work.evaluate.dense + len(work.evaluate.baselines)
        found["evaluate"] = Buffers(gpu, work.memory_limit)
        tokens = math.ceil(work.scored_tokens * work.scored_share)
        found["evaluate"].add(VALUE_BYTES * work.width * tokens * models)
    return found


def _not_estimated(work: Workload) -> list[str]:
    texts = [spec.name for spec in work.evaluate.perplexity if work.scored(spec) is None]
    found = [f"perplexity on the whole of {name}" for name in texts]
    tasks = [*work.evaluate.tasks.names, *([work.evaluate.task.name] if work.evaluate.task else [])]
    found += [f"task {name}" for name in tasks]
    if read_prompts(work.evaluate.generations):
        found.append("generated text")
    return [*found, "text that the dense model writes"] if _samples_text(work) else found


def _samples_text(work: Workload) -> bool:
    """Return whether the dense model writes text for calibration or training."""
    training = [record.options for record in work.plan.training]
    sources = [each["source"] or work.calibration.source for each in training]
    if work.tokens:
        sources.append(work.calibration.source)
    extended = any(each.get("extend") for each in training)
    return extended or any(SELF in fractions(each or {}) for each in sources)


def refuse_too_large(
    expected: Estimate, prepared: Prepared, device: str, on_host: int | None = None
) -> None:
    """Refuse a run for which the memory or the disk does not suffice.

    Files that an earlier attempt has left in the output folder count as part of the run.
    `on_host` is the number of processes on this host, by default all.

    Raises
    ------
    RecipeError
        Names the stage that needs most, and settings with which it needs less.
    """
    problems, output = Problems(), Path(prepared.recipe.output).expanduser()
    host, gpu = _memory_remedies(prepared.recipe)
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    number = on_host or expected.processes
    together = {stage: number * n_bytes for stage, n_bytes in expected.host_bytes.items()}
    _check(problems, "host memory", together, available, MARGIN, host)
    if expected.gpu_bytes:
        free = free_memory(device)
        _check(problems, "GPU memory", expected.gpu_bytes, free, MARGIN, gpu)
    free = free_disk(output) + used_disk(output)
    _check(problems, f"disk in {output}", expected.disk_bytes, free, 1.0, DISK_REMEDIES)
    problems.raise_if_any()


Remedies = Mapping[str, tuple[str, str]]
"""Stage -> the setting that helps, and how; the entry "" is for all other stages."""
DISK_REMEDIES: Remedies = {
    "": ("output", "choose a folder on a larger disk, or lower calibration.samples"),
}


def _memory_remedies(recipe: Recipe) -> tuple[Remedies, Remedies]:
    """Return what helps if memory of the host or of a GPU does not suffice for a recipe."""
    length = "calibration.length" if recipe.calibration.task is None else "calibration.task.length"
    evaluate, heal = (
        recipe.evaluate,
        "use method: block of 'heal', which trains one layer at a time",
    )
    if not evaluate.perplexity:  # only perplexities are measured one layer at a time
        where, how = "evaluate.tasks" if evaluate.task is None else "evaluate.task", "leave it out"
    elif evaluate.streaming == "always":
        where, how = "evaluate.perplexity", "lower window"
    else:
        where, how = "evaluate.streaming", "set it to always"
    host = {
        "convert": ("model.path", "give a folder with safetensors, which needs no conversion"),
        "calibrate": (
            "calibration.memory_limit_gib",
            f"lower it, so that hidden states are kept on disk, or lower {length}",
        ),
        "evaluate": (where, f"{how}, or use a machine with more memory"),
        "heal": ("stages", heal),
        "": ("calibration.memory_limit_gib", "lower it, or use a machine with more memory"),
    }
    gpu = {
        "calibrate": (length, "lower it, or use --device cpu"),
        "evaluate": (where, f"{how}, or use --device cpu"),
        "heal": ("stages", heal),
        "": ("--device", "use cpu, or a GPU with more memory"),
    }
    return host, gpu


def _check(
    problems: Problems,
    what: str,
    needed: Mapping[str, int],
    free: int,
    margin: float,
    remedies: Remedies,
) -> None:
    """Report a stage that needs more than is free."""
    stage = max(needed, key=needed.__getitem__)
    if needed[stage] <= margin * free:
        return
    where, remedy = remedies.get(stage, remedies[""])
    problems.add(
        "does-not-fit",
        where,
        f"the stage {stage} needs about {needed[stage] / GIB:,.1f} GiB of {what}, "
        f"{free / GIB:,.1f} GiB are available; {remedy}",
    )
