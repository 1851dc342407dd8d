"""Disk space that the files of a folder take."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

SHARE = 20
"""Measuring the folder takes at most this part of the time: one in ``SHARE``."""
BLOCK = 512  # bytes, the unit of `st_blocks` whatever the file system


def used_disk(folder: Path) -> int:
    """Return the disk space of all files below a folder; files that are linked count once."""
    found: dict[tuple[int, int], int] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(path, name))
            except OSError:  # deleted meanwhile
                continue
            blocks = getattr(status, "st_blocks", None)  # Windows has none
            size = status.st_size if blocks is None else BLOCK * blocks
            found[status.st_dev, status.st_ino] = size
    return sum(found.values())


def existing_folder(path: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def free_disk(folder: Path) -> int:
    """Return the free space of the disk that a folder is on, or will be."""
    return shutil.disk_usage(existing_folder(folder)).free


class DiskUse:
    """Largest disk space of a run's folder, as seen between its steps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = 0.0
        self.peak = 0

    def look(self) -> None:
        """Measure the folder."""
        start = time.monotonic()
        self.peak = max(self.peak, used_disk(self._folder))
        now = time.monotonic()
        self._next = now + SHARE * (now - start)

    def watching(self, on_step: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
        """Return a progress callback that measures the folder first, not too often."""

        def step(stage: str, done: int, total: int) -> None:
            if time.monotonic() >= self._next:
                self.look()
            on_step(stage, done, total)

        return step
