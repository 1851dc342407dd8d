"""The inputs of a slicing method, and the pass of the calibration text through its layers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.activation_cache import ActivationCache
from lrc.compressors.calibrate.calibration_passes import Labels
from lrc.compressors.calibrate.layer_executor import LayerCall, LayerExecutor, apply, batch_size
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.configs.errors import ModelError


@dataclass(frozen=True)
class SliceContext:
    """The model to slice, the calibration text, and the device to compute on."""

    architecture: Architecture
    reader: WeightReader
    windows: Callable[[], Tensor]
    """Returns the calibration windows [n_windows, length]; the text is read at the first call."""
    journal: Journal
    device: str
    memory_limit_gib: float
    seed: int
    on_step: OnStep
    labels: Labels = "model"
    """Labels of the loss whose gradients are taken."""

    def buffer(self, name: str, shape: tuple[int, int, int]) -> Tensor:
        """Return a float32 buffer on the device, in memory or on disk, within the memory limit."""
        return ActivationCache(self.journal, name, shape, self.memory_limit_gib, self.device).tensor

    def allow_tf32(self) -> AbstractContextManager[None]:
        """Allow TF32 matrix products on CUDA devices within a context."""
        return tensor_cores() if self.device.startswith("cuda") else nullcontext()


def check_finite(value: Tensor | float, what: str) -> None:
    """Raise a ModelError if a value is not finite; `what` names it, and where it was computed."""
    if not bool(torch.as_tensor(value).isfinite().all()):
        raise ModelError(
            f"model: {what} is not finite on the calibration text; the weights are "
            "damaged or overflow: check the source model"
        )


@dataclass(frozen=True)
class LayerSweep:
    """Hidden states of all calibration windows on their way through the dense model."""

    context: SliceContext
    tokens: Tensor
    """[n_windows, length]"""
    stream: LayerExecutor
    calls: list[LayerCall]
    states: Tensor
    """Input of the next layer, [n_windows, length, d_model], float32; overwritten in place."""
    batch: int
    """Windows per forward call."""

    @classmethod
    def begin(cls, context: SliceContext) -> Self:
        """Embed the calibration windows: the states are the input of the first layer."""
        tokens, device = context.windows(), context.device
        stream = LayerExecutor(
            context.architecture, context.reader, device=device, dtype=torch.float32
        )
        batch = batch_size(len(tokens), tokens.shape[1], device)
        with stream.around_layers():
            calls = stream.trace(tokens, batch)
            shape = (tokens.shape[0], tokens.shape[1], stream.embed(tokens[:1]).shape[-1])
            sweep = cls(context, tokens, stream, calls, context.buffer("states", shape), batch)
            for rows in sweep.batches():
                sweep.states[rows] = stream.embed(tokens[rows])
        return sweep

    def batches(self) -> Iterator[slice]:
        """Yield the window indices of each batch."""
        for start in range(0, len(self.states), self.batch):
            yield slice(start, start + self.batch)

    def inputs(self) -> Iterator[Tensor]:
        """Yield the states of each batch on the device."""
        for rows in self.batches():
            yield self.states[rows].to(self.context.device)

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module, states: Tensor | None = None) -> None:
        """Replace the states, or others of the same shape, by the output of a resident layer."""
        states = self.states if states is None else states
        for rows in self.batches():
            x = states[rows].to(self.context.device)
            states[rows] = apply(layer, self.calls[index], x)
