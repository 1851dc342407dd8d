"""Seconds, memory and disk space of every stage of a run, and what more layers would take."""

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lrc.compressors.io.machine import Clock, OnStep
from lrc.configs.size import GIB

BY_LAYER = ("calibrate", "gradients", "allocate", "compress", "heal", "evaluate layer by layer")
"""Steps of the progress that are layers."""
OTHER = "other"
SAMPLE_SECONDS = 0.5  # between two looks at the disk


class StageCosts:
    """Watches the stages of a run through its clock and its progress.

    Parameters
    ----------
    device : str
    folder : Path
        The output folder, whose size is watched.
    on_step : callable
        Is called with the progress.
    """

    def __init__(self, device: str, folder: Path, on_step: OnStep) -> None:
        self._device, self._folder, self._show = device, folder, on_step
        self.stages: dict[str, dict[str, float]] = {}
        self._open: list[str] = []
        self._looked = 0.0
        self._times: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._totals: dict[tuple[str, str], int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all stages that begin in the context; what is in none of them is `OTHER`."""
        timed = Clock.__call__
        watch = self._stage

        @contextmanager
        def watched(clock: Clock, stage: str) -> Iterator[None]:
            with watch(stage), timed(clock, stage):
                yield

        Clock.__call__ = watched
        reset_peaks(self._device)
        try:
            with watch(OTHER):
                yield
        finally:
            Clock.__call__ = timed
            stages = [found for name, found in self.stages.items() if name != OTHER]
            self.stages[OTHER]["seconds"] -= sum(found["seconds"] for found in stages)

    def on_step(self, stage: str, done: int, total: int) -> None:
        """Note the time of a step, and show it."""
        if self._open:
            key = self._open[-1], stage
            if stage in BY_LAYER:
                self._times[key].append(time.monotonic())
                self._totals[key] = total
            if time.monotonic() - self._looked > SAMPLE_SECONDS:
                self._look_at_disk()
        self._show(stage, done, total)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._fold()
        self._open.append(name)
        empty = {"seconds": 0.0, "gpu_gib": 0.0, "host_gib": 0.0, "disk_gib": 0.0}
        found = self.stages.setdefault(name, empty)
        start = time.monotonic()
        try:
            yield
        finally:
            found["seconds"] += time.monotonic() - start
            self._fold()
            self._open.pop()

    def _fold(self) -> None:
        """Note the peaks since the last call for all open stages."""
        self._look_at_disk()
        peaks = {"gpu_gib": 0.0, "host_gib": peak_resident() / GIB}
        if self._device.startswith("cuda"):
            peaks["gpu_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
        for stage in self._open:
            for key, value in peaks.items():
                self.stages[stage][key] = max(self.stages[stage][key], value)
        reset_peaks(self._device)

    def _look_at_disk(self) -> None:
        self._looked = time.monotonic()
        n_bytes = allocated_bytes(self._folder) / GIB
        for stage in self._open:
            self.stages[stage]["disk_gib"] = max(self.stages[stage]["disk_gib"], n_bytes)

    def seconds_by_layer(self, n_layers: int) -> dict[str, float]:
        """Return the seconds that one more layer takes, by stage.

        From the time between the first and the last layer, since the first one also pays for what
        happens once.
        """
        found: dict[str, float] = defaultdict(float)
        for (stage, step), times in self._times.items():
            if len(times) > 1:
                each = (times[-1] - times[0]) / (len(times) - 1)
                found[stage] += each * self._totals[stage, step] / n_layers
        return found

    def extrapolated(self, n_layers: int, depth: int, in_layers: float) -> dict[str, Any]:
        """Return what `depth` layers would take if all were as the `n_layers` of the run.

        `in_layers` is the fraction of the model's bytes that is in layers.
        """
        by_layer = self.seconds_by_layer(n_layers)
        bytes_ratio = 1 + in_layers * (depth / n_layers - 1)
        seconds = {}
        for stage, found in self.stages.items():
            more = (depth - n_layers) * by_layer.get(stage, 0.0)
            if stage in ("save", "convert"):
                more = found["seconds"] * (bytes_ratio - 1)
            seconds[stage] = round(found["seconds"] + more, 1)
        disk = max(found["disk_gib"] for found in self.stages.values())
        return {
            "extrapolated_to_layers": depth,
            "seconds": seconds,
            "total_seconds": round(sum(seconds.values()), 1),
            "disk_gib_at_most": round(disk * depth / n_layers, 1),
            "note": f"extrapolated from {n_layers} layers; peak memory of a layer does not change",
        }


def peak_resident() -> int:
    """Return the largest resident memory of this process since `reset_peaks`, in bytes.

    Of Linux; 0 elsewhere. Pages of mapped files count.
    """
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return 1024 * int(found[1])
    return 0


def reset_peaks(device: str) -> None:
    """Measure peaks of memory of the host and of `device` from here on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux; elsewhere the peak of the whole process is reported
        Path("/proc/self/clear_refs").write_text("5")


def allocated_bytes(folder: Path) -> int:
    """Return the disk space that the files of a folder take, which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


def exponents(results: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Fit ``cost = c * parameters ** exponent`` by least squares of logarithms.

    `results` maps numbers of parameters to costs by name.
    """
    names = [
        n for n in next(iter(results.values())) if all(r.get(n, 0) > 0 for r in results.values())
    ]
    x = [math.log(size) for size in results]
    mean = sum(x) / len(x)
    square = sum((each - mean) ** 2 for each in x)
    found = {}
    for name in names:
        y = [math.log(costs[name]) for costs in results.values()]
        found[name] = round(sum((a - mean) * b for a, b in zip(x, y, strict=True)) / square, 3)
    return found


@contextmanager
def smaller_gpu(device: str, gib: float | None) -> Iterator[None]:
    """Let PyTorch have only some memory of a GPU in the context, as on a smaller one."""
    if gib is None or not device.startswith("cuda"):
        yield
        return
    real: Callable[..., tuple[int, int]] = torch.cuda.mem_get_info
    limit, total = int(gib * GIB), real(device)[1]
    index = torch.device(device).index or 0
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
    torch.cuda.mem_get_info = lambda *_: (limit - torch.cuda.memory_reserved(device), limit)
    try:
        yield
    finally:
        torch.cuda.mem_get_info = real
        torch.cuda.set_per_process_memory_fraction(1.0, index)
