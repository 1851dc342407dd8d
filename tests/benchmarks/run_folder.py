"""The temporary folder of a benchmark, which is deleted at its end and after it was killed."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

LOCK = "lock"


@contextmanager
def run_folder(name: str, parent: str | None, *, keep: bool = False) -> Iterator[Path]:
    """Yield a new folder, and delete it at the end unless `keep`.

    SIGTERM, which `timeout` and job schedulers send, ends the process as an exception does. What
    processes have left that were ended by SIGKILL is deleted when the next one starts: a process
    holds a lock in its folder.
    """
    root = Path(parent or tempfile.gettempdir())
    for left in root.glob(f"{name}-*/{LOCK}"):
        # A folder stays if its process runs (Timeout), has just deleted it or belongs to another
        # user (OSError), or if the file system has no locks: tidying must not stop a benchmark.
        with suppress(OSError, NotImplementedError, Timeout), FileLock(left, timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
    before = signal.signal(signal.SIGTERM, _end)
    try:
        if keep:
            yield folder
        else:
            with FileLock(folder / LOCK):
                yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)
