"""Write results in threads, while the device computes the next ones."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch

DEVICE_TYPES = {"cuda"}
"""Devices that compute while the host writes. A CPU would only share its cores and its memory."""
THREADS = 2
BYTES = 4 * 10**9
"""Of all results that are being written; a larger one is written alone."""


class BackgroundWrites:
    """Writes that end, at the latest, at the end of the context; errors of a write are raised.

    An error is raised by the next call, or at the end of the context. If the context ends with
    another error, writes that have begun are finished first.

    Parameters
    ----------
    device : str
        On which the results are computed. With a CPU, nothing is in the background.
    """

    def __init__(self, device: str) -> None:
        in_background = torch.device(device).type in DEVICE_TYPES
        self._threads = ThreadPoolExecutor(THREADS, "write") if in_background else None
        self._begun: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> Self:
        """Return the object."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait for all writes."""
        try:
            if kind is None:
                self.finish()
        finally:
            if self._threads is not None:
                self._threads.shutdown()

    def add(self, n_bytes: int, prepare: Callable[[], Callable[[], None]]) -> None:
        """Begin a write as soon as there is room for it.

        Parameters
        ----------
        n_bytes : int
            Memory that it takes until it has ended.
        prepare : callable
            Called now, in this thread, when there is room: copies the result to the host, and
            returns what writes it. Its files must appear only when they are complete.
        """
        if self._threads is None:
            prepare()()
            return
        while self._begun and (
            self._begun[0][1].done() or n_bytes + sum(size for size, _ in self._begun) > BYTES
        ):
            self._begun.popleft()[1].result()
        self._begun.append((n_bytes, self._threads.submit(prepare())))

    def finish(self) -> None:
        """Wait until all results are on disk."""
        while self._begun:
            self._begun.popleft()[1].result()
