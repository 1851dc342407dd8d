"""What is measured: every combination of mode, batch size and prompt length."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import product

SEED = 0
"""Of the random token ids of the prompts."""


class Mode(StrEnum):
    """How a decoding step is run; a prompt is always read by a plain forward."""

    EAGER = "eager"
    """A plain forward, with a cache that grows."""
    COMPILE = "compile"
    """The step compiled by `torch.compile`, with a static cache."""
    GRAPH = "graph"
    """The step recorded as one CUDA graph, with a static cache."""


@dataclass(frozen=True)
class Point:
    """One place of the grid."""

    mode: Mode
    batch: int
    """Sequences that are generated at the same time."""
    prompt: int
    """Tokens of every prompt."""
    tokens: int
    """Decoding steps after the prompt, one new token per sequence each."""

    def __str__(self) -> str:
        tokens = f"{self.tokens:,} new token{'s' if self.tokens > 1 else ''}"
        return f"{self.mode}, batch {self.batch}, prompt {self.prompt:,}, {tokens}"


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often."""

    modes: tuple[Mode, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: int
    repeats: int
    """Rounds; a round measures every model once."""
    seconds: float | None = None
    """Time for the rounds of one point: no further round is started after it."""

    def points(self) -> list[Point]:
        """Return the grid: prompts vary fastest, modes slowest; repeated values count once."""
        places = dict.fromkeys(product(self.modes, self.batches, self.prompts))
        return [Point(*place, tokens=self.tokens) for place in places]


def default_modes(device: str) -> tuple[Mode, ...]:
    """Return the modes that are measured if none is requested."""
    return (Mode.EAGER, Mode.GRAPH) if device.startswith("cuda") else (Mode.EAGER,)


def turn_order(models: int, *, dense: bool) -> list[int]:
    """Return the order in which the models of a round take turns, by their indices.

    With `dense`, model 0 is the one that others are compared with, and is measured again after
    them: the difference between its two results is noise.

    >>> turn_order(3, dense=True)
    [0, 1, 2, 0]
    """
    return [*range(models), *([0] if dense else [])]
