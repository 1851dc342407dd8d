"""The machine a run executes on: device, progress callback, memory and time of the stages."""

import gc
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.io.disk_use import DiskUse
from lrc.compressors.io.freed_memory import trim
from lrc.compressors.io.gpu_allocator import use_expandable_segments
from lrc.compressors.io.journal import Journal
from lrc.configs.errors import Problem, RecipeError

OnStep = Callable[[str, int, int], None]
"""Progress callback, called with (stage, done, total) when everything finished so far is on disk,
or is being written in the background, which ends before an error leaves the stage. May raise to
stop. Must not print to stdout, which is redirected while an lm-eval task runs."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress."""


def no_warning(text: str) -> None:
    """Ignore a warning."""


def no_loss(ranks: list[int]) -> None:
    """Ignore the end of other processes: communication with them fails."""


@dataclass(frozen=True)
class Machine:
    """How to run, as opposed to what: the same recipe gives the same result elsewhere.

    `device` is a torch device or ``auto``; `on_step` may raise `Stopped`; `on_warning` is called
    with every warning of the plan before work starts. `processes` execute the run together;
    `on_lost` is called, in a thread, with the numbers of those that have ended before its end.
    """

    device: str = "auto"
    overwrite: bool = False
    on_step: OnStep = no_progress
    on_warning: Callable[[str], None] = no_warning
    processes: Processes = ALONE
    on_lost: Callable[[list[int]], None] = no_loss

    def __post_init__(self) -> None:
        """Raise `RecipeError` if the device does not exist here."""
        if self.device in ("auto", "cpu"):
            return
        found = re.fullmatch(r"cuda(?::(0|[1-9][0-9]{0,3}))?", self.device)
        if found is None:
            problem = f"must be auto, cpu, cuda or cuda:N, got {self.device!r}; choose one of them"
            raise RecipeError([Problem("unknown-device", "--device", problem)])
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(found[1] or 0) >= count:
            several = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda"
            remedy = several if count else "cpu, or install a torch build for your GPU"
            problem = f"{self.device} requested, but torch sees {count} GPUs; use --device {remedy}"
            raise RecipeError([Problem("unknown-device", "--device", problem)])

    @property
    def chosen(self) -> str:
        """The device; for ``auto``, a GPU if there is one."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device torch's current one, which Triton kernels and libraries work on."""
        if not self.chosen.startswith("cuda"):
            yield
            return
        use_expandable_segments()
        with torch.cuda.device(self.chosen):
            yield


class Clock:
    """Seconds of each stage, summed over the runs it took, and the disk space of this one.

    A stage inside another one, such as the conversion of the source when its weights are first
    read, does not count as part of it. The seconds are written to the journal if `keep`.
    """

    def __init__(self, journal: Journal, *, keep: bool = True) -> None:
        self._journal, self._keep = journal, keep
        self._inside = self._cpu_inside = 0.0
        """Time of the stages that have ended inside the present one."""
        self.disk = DiskUse(journal.output)
        self.cpu_seconds: dict[str, float] = {}
        """Time of all threads of this process."""
        self.seconds: dict[str, float] = (
            journal.read_json("seconds.json") if journal.has("seconds.json") else {}
        )

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage, also if it ends in an error."""
        start, processor = time.monotonic(), time.process_time()
        before = self._inside, self._cpu_inside
        self._inside = self._cpu_inside = 0.0
        try:
            yield
        finally:
            release_memory()
            self.disk.look()
            elapsed, used = time.monotonic() - start, time.process_time() - processor
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._inside
            self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + used - self._cpu_inside
            self._inside, self._cpu_inside = before[0] + elapsed, before[1] + used
            if self._keep:
                self._journal.write_json("seconds.json", self.seconds)


def free_memory(device: str) -> int:
    """Return the bytes that are free on a GPU, or available on the host for ``cpu``."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_memory() -> None:
    """Collect garbage and return free pages to the system.

    glibc keeps freed blocks; after a stage that held a whole model in pieces they are hundreds of
    megabytes, which would count as memory of the next stage.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()  # from torch 2.12 on
    trim()
