"""Notice that a process of the run has ended: every process holds a lock, which ends with it.

This also works while a process computes or waits for a GPU, and after any kind of end. Locks of
other hosts are seen if the shared file system supports locks.
"""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

SECONDS = 1.0
"""Time between two checks of the locks."""


class Watch:
    """Holds the lock of this process, and checks those of the others.

    Parameters
    ----------
    folder : Path
        Of the locks, the same for all processes.
    rank, size : int
        Number of this process, and number of processes.
    on_lost : callable
        Called once, in a thread, with the numbers of the processes that have ended.
    """

    def __init__(
        self, folder: Path, rank: int, size: int, on_lost: Callable[[list[int]], None]
    ) -> None:
        self._folder, self._others = folder, [each for each in range(size) if each != rank]
        self._on_lost = on_lost
        self._lock = os.open(self._path(rank), os.O_RDWR | os.O_CREAT)
        _flock(self._lock, shared=False)
        self._ended = Event()
        self._thread = Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Start checking, once all processes hold their locks."""
        self._thread.start()

    def stop(self) -> None:
        """Stop checking; the lock is kept until `release`."""
        self._ended.set()
        self._thread.join()

    def release(self) -> None:
        """Release the lock, once no process checks any more."""
        os.close(self._lock)

    def lost(self) -> list[int]:
        """Return the numbers of the processes that have ended."""
        return [rank for rank in self._others if self._is_free(rank)]

    def _look(self) -> None:
        while not self._ended.wait(SECONDS):
            if lost := self.lost():
                self._on_lost(lost)
                return

    def _is_free(self, rank: int) -> bool:
        descriptor = os.open(self._path(rank), os.O_RDONLY)
        try:
            _flock(descriptor, shared=True)  # several may check at the same time
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank}.lock"


def _flock(descriptor: int, *, shared: bool) -> None:
    """Lock a file without waiting, until the descriptor is closed."""
    import fcntl  # not on Windows, where no run has several processes

    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
