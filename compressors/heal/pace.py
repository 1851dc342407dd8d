"""The speed of training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Tokens and seconds of the training steps of this process.

    The first step is left out: on a GPU it also loads kernels and reserves memory. Neither are
    measurements on held-out text counted.
    """

    def __init__(self) -> None:
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Count the context as a step of so many tokens; it must wait for the device in the end."""
        start = time.perf_counter()
        yield
        if self._steps:
            self._tokens += tokens
            self._seconds += time.perf_counter() - start
        self._steps += 1

    @property
    def tokens_per_second(self) -> float | None:
        """The speed; None if fewer than two steps were counted."""
        return self._tokens / self._seconds if self._seconds else None
