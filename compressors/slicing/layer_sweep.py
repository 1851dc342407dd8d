"""The calibration text on its way up through a model that is to be sliced, layer after layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lrc.compressors.calibrate.activation_cache import ActivationCache
from lrc.compressors.calibrate.layer_executor import LayerCall, LayerExecutor, batch_size
from lrc.compressors.slicing.slice_method import Work


@dataclass(frozen=True)
class Ascent:
    """What enters a layer for every window, and how the layers are called."""

    stream: LayerExecutor
    calls: list[LayerCall]
    states: Tensor
    """[n_windows, length, d_model], float32; to be rewritten in place."""
    batch: int
    """Windows that go through a layer together."""

    @classmethod
    def begin(cls, work: Work, tokens: Tensor) -> Self:
        """Embed the windows `tokens` [n_windows, length]: the states enter the first layer."""
        stream = LayerExecutor(
            work.architecture, work.reader, device=work.device, dtype=torch.float32
        )
        batch = batch_size(len(tokens), tokens.shape[1], work.device)
        with stream.around_layers():
            calls = stream.trace(tokens, batch)
            shape = (tokens.shape[0], tokens.shape[1], stream.embed(tokens[:1]).shape[-1])
            states = ActivationCache(
                work.journal, "states", shape, work.memory_limit_gib, work.device
            ).tensor
            found = cls(stream, calls, states, batch)
            for rows in found.rows():
                states[rows] = stream.embed(tokens[rows])
        return found

    def rows(self) -> Iterator[slice]:
        """Yield the windows of one batch after the other."""
        for start in range(0, len(self.states), self.batch):
            yield slice(start, start + self.batch)
