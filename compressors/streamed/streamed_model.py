"""A model on the windows of an evaluation text, with one decoder layer in memory.

Unlike in calibration, no layer is read to find out how the model calls it: the arguments of a layer
(masks, positions, rotary tables) do not depend on its weights, so that layers which return their
input suffice. `layer_check` has verified this for the architecture.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_calls import LayerCall
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.io.device_copies import on_device
from lrc.compressors.io.freed_memory import drop_shared_pages
from lrc.compressors.layers import TiedHead
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import SkeletonFiller


@dataclass(frozen=True)
class ModelFiles:
    """A model of which nothing is in memory."""

    architecture: Architecture
    reader: SkeletonFiller
    calls: Sequence[LayerCall]
    """How the layers are called on another text: only what they return is used."""
    dtype: torch.dtype
    """Precision in which it runs."""


class StreamedModel(LayerExecutor):
    """A model on the windows of one text; several of them may share one skeleton.

    Parameters
    ----------
    context : CalibrationContext
        With the windows of the text.
    files : ModelFiles
        The model.
    """

    def __init__(self, context: CalibrationContext, files: ModelFiles) -> None:
        super().__init__(context, in_turn=True)
        self.dtype = files.dtype
        self._returned = [call.others for call in files.calls]

    @torch.no_grad()
    def trace(self) -> list[LayerCall]:
        """Record how every layer is called on the first and the last batch.

        Neither layers nor embeddings are read.
        """
        calls = [LayerCall(others=others) for others in self._returned]
        self._record(calls)
        return calls

    @contextmanager
    def around_logits(self) -> Iterator[None]:
        """Load what follows the layers: the last norm and the output embedding."""
        tied = isinstance(self.architecture.model.get_output_embeddings(), TiedHead)
        with self.around_layers(head=True) if tied else self._without_embedding():
            yield


class StateLogits:
    """Reads the logits of a model from the output of its last layer, within `around_logits`.

    Parameters
    ----------
    model : StreamedModel
    states : Tensor, shape [n_windows, length, d_model]
    """

    repeats = False

    def __init__(self, model: StreamedModel, states: Tensor) -> None:
        self._model, self._states, self.dtype = model, states, model.dtype
        self.processes = model.context.processes
        self._places = {number: place for place, number in enumerate(model.numbers)}
        config = model.architecture.model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)

    def own(self, count: int) -> Sequence[int]:
        """Return the numbers of those of the first `count` windows whose states are here."""
        return [number for number in self._model.numbers if number < count]

    def first(self, length: int) -> int:
        """Return 0: a token is predicted at every position but the last."""
        return 0

    def pieces(self, number: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the first position of every piece of a window, and its logits [n, vocabulary]."""
        place, last = self._places[number], self._states.shape[1] - 1
        for start in range(0, last, size):
            rows = slice(start, min(start + size, last))
            hidden = on_device(self._states[place, rows], self._model.context.device, self.dtype)
            ids = self._model.tokens[place, rows]
            yield start, self._model.logits(hidden[None], ids[None])[0]
        drop_shared_pages(self._states[place])
