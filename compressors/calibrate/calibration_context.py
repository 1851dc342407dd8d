"""The inputs of everything that runs the calibration text through a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.corpus.pairs import Pairs
from lrc.compressors.corpus.sentences import Sentences
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.io.finite import all_finite
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import SkeletonFiller
from lrc.configs.errors import ModelError

GPU_FRACTION = 0.15  # of each of three buffers; a layer, its moments and a batch need the rest
Labels = Literal["model", "sampled", "real"]


@dataclass(frozen=True)
class CalibrationContext:
    """A dense model, the calibration text, and the device to compute on."""

    architecture: Architecture
    reader: SkeletonFiller
    windows: Callable[[], Tensor]
    """Returns the calibration windows [n_windows, length]; the text is read at the first call."""
    journal: Journal
    device: str
    memory_limit_gib: float
    """For the hidden states of all windows; what is larger goes to disk."""
    seed: int
    on_step: OnStep
    labels: Labels = "model"
    """Labels of the loss whose gradients are taken, see `logit_gradient`."""
    sentences: Callable[[], Sentences | Pairs] | None = None
    """Of an encoder or an encoder-decoder model: returns the padded texts whose tokens are the
    `windows`."""
    counted: Callable[[], Tensor | None] = lambda: None
    """Returns which tokens count in the loss [n_windows, length]; None for all."""
    processes: Processes = ALONE
    """Processes over which the windows are divided."""
    gpu_fraction: float = GPU_FRACTION
    """Part of the free memory of a GPU that each buffer of hidden states may take."""

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return torch.device(self.device).type


def check_finite(
    value: Tensor | float,
    what: str,
    remedy: str = "its weights or those before it are damaged or overflow: check the source model",
) -> None:
    """Raise a ModelError if a value is not finite; `what` names it, and where it was computed."""
    if not all_finite(torch.as_tensor(value)):
        raise ModelError(f"model: not finite on the calibration text: {what}; {remedy}")
