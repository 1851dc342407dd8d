"""When training ends, and after which steps the loss on held-out text is measured."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

JUDGEMENTS = 10
"""How often the loss on held-out text is measured during training."""
ASSUMED_STEPS = 100
"""Number of steps that are expected before the time of one is known."""


class Budget(ABC):
    """How long a descent continues."""

    @abstractmethod
    def total(self, done: int) -> int:
        """Return the number of steps in all, as expected after `done` of them."""

    @abstractmethod
    def is_judged(self, done: int) -> bool:
        """Return whether the loss on held-out text is measured after `done` steps."""

    @abstractmethod
    def advance(self) -> None:
        """Take note that a step is finished."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return JSON values from which `resume` continues."""

    @abstractmethod
    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


class StepBudget(Budget):
    """A fixed number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def total(self, done: int) -> int:
        """Return the number of steps in all."""
        return self._steps

    def is_judged(self, done: int) -> bool:
        """Return whether the loss is measured: about `JUDGEMENTS` times, and after the last."""
        return done == self._steps or done % max(1, self._steps // JUDGEMENTS) == 0

    def advance(self) -> None:
        """Do nothing: the number of steps is all that counts."""

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


class TimeBudget(Budget):
    """As many steps as fit into a time, and at least one unless none is left.

    The number of steps is estimated again after every step, from the mean time of those so far with
    the measurements between them; the first, which includes preparations, does not count. The
    learning rate thus falls to zero at the end, although nobody knows the number of steps before.

    Parameters
    ----------
    seconds : float
        From now on. A layer may get none, if the layers before it took longer than their share.
    clock : callable
        Returns the time in seconds.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._start = clock()
        # Seconds after the first step, the last one, and the one before that.
        self._first = self._last = self._before = 0.0

    def total(self, done: int) -> int:
        """Return the number of steps that are expected in all."""
        left = self._seconds - self._last
        if left <= 0:
            return done
        if done < 2:
            return done + ASSUMED_STEPS
        mean = (self._last - self._first) / (done - 1)
        return done + int(left / max(mean, 1e-9))  # a clock may stand still

    def is_judged(self, done: int) -> bool:
        """Return whether a tenth of the time has ended, or all of it."""
        tenths = [int(JUDGEMENTS * at / self._seconds) for at in (self._before, self._last)]
        return tenths[0] < tenths[1] or self.total(done) == done

    def advance(self) -> None:
        """Take note of the time at the end of a step."""
        self._before, self._last = self._last, self._clock() - self._start
        self._first = self._first or self._last

    def state(self) -> dict[str, Any]:
        """Return the times so far."""
        return {
            "elapsed": self._clock() - self._start,
            "first": self._first,
            "last": self._last,
            "before": self._before,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue with the time that was left."""
        self._start = self._clock() - state["elapsed"]
        self._first, self._last = state["first"], state["last"]
        self._before = state["before"]
