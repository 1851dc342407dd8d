"""Load only some modules of a model: one decoder layer, or everything around the layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.io.freed_memory import trim
from lrc.compressors.models.architecture import Linear


class ResidentModules:
    """Fills and empties the skeleton of the context's architecture in place."""

    dtype = torch.float32
    """Precision of the weights and of the computation."""

    def __init__(self, context: CalibrationContext) -> None:
        self.context, self.architecture = context, context.architecture
        self._last = -1
        """Index of the layer that was loaded last."""
        head = self.architecture.model.get_output_embeddings()
        embedding = self.architecture.model.get_input_embeddings()
        modules = [*self.architecture.model.named_modules()]
        self._heads = [name for name, module in modules if module is head]
        self._embeddings = [name for name, module in modules if module is embedding]

    def linears(self, index: int) -> dict[str, Linear]:
        """Return the linears of a decoder layer by name."""
        return {
            linear.name: linear for linear in self.architecture.linears if linear.layer == index
        }

    @contextmanager
    def around_layers(self, *, head: bool = False, ahead: int | None = None) -> Iterator[None]:
        """Load everything outside the layers (embeddings, norms, rotary tables).

        The output embedding, which can be larger than a layer, is loaded only if `head`. Inside the
        context, the layer `ahead` is read if it is given.
        """
        names = self.architecture.layer_names
        skip = [*names, *([] if head else self._heads)]
        self._read_ahead("")
        with self._filled("", skip):
            if ahead is not None:
                self._read_ahead(names[ahead])
            yield

    @contextmanager
    def layer(self, index: int, *, again: bool = False) -> Iterator[nn.Module]:
        """Load one decoder layer, and start to read the next in the direction of the pass.

        With `again`, for a layer that will be loaded once more before any other, read it instead.
        """
        with self._layer_alone(index, again=again) as layer:
            yield layer

    @contextmanager
    def _layer_alone(self, index: int, *, again: bool = False) -> Iterator[nn.Module]:
        """Do the same as `layer`, without modules around the layer that are part of its step."""
        step = -1 if self._last == index + 1 else 1
        self._last, names = index, self.architecture.layer_names
        following = index if again else index + step
        with self._filled(names[index]):
            if 0 <= following < len(names):
                self._read_ahead(names[following])
            yield self.architecture.layers[index]

    @contextmanager
    def _without_embedding(self, skip: Sequence[str] = ()) -> Iterator[None]:
        """Load everything outside the layers, and let the input embedding return zeros."""
        skip = [*self.architecture.layer_names, *self._embeddings, *skip]
        embedding = self.architecture.model.get_input_embeddings()
        zeros = partial(_zeros, embedding.embedding_dim, self.context.device, self.dtype)
        with self._filled("", skip), _forward_replaced(embedding, zeros):
            yield

    def _read_ahead(self, name: str) -> None:
        self.context.reader.read_ahead(name, device=self.context.device)

    @contextmanager
    def _filled(self, name: str, skip: Sequence[str] = ()) -> Iterator[None]:
        reader = self.context.reader
        reader.fill_(name, device=self.context.device, dtype=self.dtype, skip=skip)
        try:
            yield
        finally:
            reader.empty_(name, skip=skip)
            trim()  # otherwise memory grows with the number of layers


@contextmanager
def _forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # that of the class is visible again
        if before is not None:
            module.forward = before


def _zeros(width: int, device: str, dtype: torch.dtype, ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, width, device=device, dtype=dtype)
