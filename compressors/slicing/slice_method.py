"""The interface of slicing methods, which produce a smaller dense model.

A method first plans the config of the smaller model from shapes alone, so that later stages can be
planned before any weight is read. It then computes the tensors of a checkpoint with that config.
Shapes that config.json cannot describe are stored in tables inside it, see `model_shapes`. Widths
that depend on calibration are planned evenly at the same total size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.models.architecture import Architecture
from lrc.configs.errors import RecipeError
from lrc.configs.size import least_text, most_text, suitable_unit
from lrc.configs.slice import SliceBase

OptionsT = TypeVar("OptionsT", bound=SliceBase)


@dataclass(frozen=True)
class Budget:
    """The maximum size of the smaller model: bytes of its tensors at the precision of the file."""

    where: str
    """Key path of the budget in the recipe, such as ``stages[0].slice.keep``."""
    bytes: int
    dense_bytes: int
    header_bytes: int = 0
    """Headers of the files, which are part of the sizes in the recipe if it gives that of files."""

    @property
    def allowed(self) -> str:
        """The budget as messages show it."""
        return most_text(self.bytes + self.header_bytes, suitable_unit(self.dense_bytes))

    def needed(self, n_bytes: int) -> str:
        """Return the budget that a model with tensors of so many bytes needs, rounded up."""
        return least_text(n_bytes + self.header_bytes, suitable_unit(self.dense_bytes))

    def too_small(self, least: int, what: str, otherwise: str = "") -> RecipeError:
        """Return the error for a budget below the `least` bytes that a model can have.

        `what` describes that model, and `otherwise` is another remedy.
        """
        remedy = f"raise it, or {otherwise}" if otherwise else "raise it"
        share = math.ceil(1000 * least / self.dense_bytes) / 1000
        return self.refusal(
            f"must be at least {share:.3f} of the model ({self.needed(least)}: {what}), got "
            f"{self.allowed} of {self.needed(self.dense_bytes)}; {remedy}"
        )

    def refusal(self, reason: str) -> RecipeError:
        """Return the error for a budget that cannot be met."""
        return RecipeError(f"{self.where}: {reason}")


@dataclass(frozen=True)
class SlicedModel:
    """The config and the tensors of the smaller model."""

    config: PreTrainedConfig
    """The planned config, completed by what calibration determines."""
    tensors: Iterator[tuple[str, Tensor]]
    """All stored parameters in the order of `stored_parameters`, on the CPU, at the precision of
    the source."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON values for the report; complete once all tensors have been read."""


def with_tables(config: PreTrainedConfig, tables: dict[str, Any]) -> PreTrainedConfig:
    """Return a config with tables of what it cannot describe."""
    changed: PreTrainedConfig = deepcopy(config)
    changed.quantization_config = quantization_config({}, tables)
    return changed


class SliceMethod(ABC, Generic[OptionsT]):
    """A slicing method; an entry of the METHODS table. All of them read calibration text."""

    KEEPS_STREAM: ClassVar[bool] = False
    """Whether the smaller model approximates the output of every layer of the dense one."""

    @abstractmethod
    def plan(
        self, architecture: Architecture, options: OptionsT, budget: Budget
    ) -> PreTrainedConfig:
        """Return the config of the largest smaller model within the budget.

        Raises a `RecipeError` if the method does not support the architecture, or no model fits.
        """

    def pending(self, options: OptionsT, config: PreTrainedConfig) -> str | None:
        """Describe the shapes of a planned config that calibration will choose, if any."""
        return None

    def recommended_tokens(self, architecture: Architecture) -> int:
        """Return the number of calibration tokens below which quality suffers."""
        return 0

    def passes(self, options: OptionsT, config: PreTrainedConfig) -> float:
        """Return the approximate number of forward passes over the text, to estimate the time."""
        return 1.0

    @abstractmethod
    def apply(
        self, context: CalibrationContext, options: OptionsT, config: PreTrainedConfig
    ) -> SlicedModel:
        """Slice the model of the context to the planned config."""
