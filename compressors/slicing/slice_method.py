"""What every method of slicing answers: a smaller dense model, first as a config, then as weights.

A slicing method is planned from shapes alone: the config of the smaller model and with it every
shape is known before a weight is read, so that the stages behind it can be planned too. Carried out
it gives the tensors of a checkpoint of that config. Where layers get shapes of their own, the
config carries a table of them, see `layers.shapes`; what only data share out between layers is
planned as evenly as it can be, and of the same size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.labels import Labels
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.progress import OnStep
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.configs.slice import SliceBase


@dataclass(frozen=True)
class Budget:
    """What the smaller model may cost: bytes of its tensors, each at its precision in the file."""

    where: str
    """Place in the recipe that asks for it, such as ``stages[0].slice.keep``."""
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Work:
    """What a method that is carried out works with: a dense model, text, and a machine."""

    architecture: Architecture
    reader: WeightReader
    windows: Callable[[], Tensor]
    """Returns the calibration windows [samples, length]; drawn only when asked for."""
    journal: Journal
    device: str
    memory_limit_gib: float
    seed: int
    on_step: OnStep
    labels: Labels = "model"
    """What gradients are taken of."""


@dataclass(frozen=True)
class Sliced:
    """A smaller model."""

    config: PreTrainedConfig
    """As planned; a method may add what only data could tell. No shape changes any more, but for
    those that it has called pending."""
    tensors: Iterator[tuple[str, Tensor]]
    """Every stored parameter by its name in the smaller model, once, layer after layer, in the
    order of its `stored_parameters`, on the CPU at the precision of the source."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the report, as JSON values."""


class SliceMethod(ABC):
    """A row of the table of slicing methods."""

    source: str
    """The paper."""
    reads_text: bool = True
    """Whether calibration text is read."""

    @abstractmethod
    def plan(
        self, architecture: Architecture, options: SliceBase, budget: Budget
    ) -> PreTrainedConfig:
        """Return the config of the largest smaller model within the budget.

        Raises
        ------
        RecipeError
            If the architecture cannot be sliced so, or not that far, or only grows by it: with the
            reason, and what helps.
        """

    def pending(self, options: SliceBase, config: PreTrainedConfig) -> str | None:
        """Name what of a planned config only data decide; None if every shape is known.

        The bytes of the model are known all the same.
        """
        return None

    def advised_tokens(self, architecture: Architecture) -> int:
        """Return below how many calibration tokens results get poor."""
        return 0

    def passes(self, options: SliceBase, config: PreTrainedConfig) -> float:
        """Return how often about it sends the text through the dense model: to estimate time."""
        return 1.0

    @abstractmethod
    def carry_out(self, work: Work, options: SliceBase, config: PreTrainedConfig) -> Sliced:
        """Slice the model of `work` down to the planned config."""
