"""Where a run takes place, and how long its stages take there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lrc.compressors.io.journal import Journal
from lrc.compressors.io.memory import release_memory
from lrc.compressors.io.progress import OnStep


@dataclass(frozen=True)
class Machine:
    """How to run, as opposed to what: the same recipe gives the same result elsewhere.

    `device` is a torch device or ``auto``; `on_step` is told (stage, done, total) and may raise
    `Stopped`.
    """

    device: str = "auto"
    overwrite: bool = False
    on_step: OnStep = field(default=lambda stage, done, total: None)

    @property
    def chosen(self) -> str:
        """The device that ``auto`` stands for."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


class Clock:
    """Seconds of each stage, summed over the runs it took."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.seconds: dict[str, float] = (
            journal.read_json("seconds.json") if journal.has("seconds.json") else {}
        )

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage, also if it ends in an error."""
        start = time.monotonic()
        try:
            yield
        finally:
            release_memory()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
            self._journal.write_json("seconds.json", self.seconds)
