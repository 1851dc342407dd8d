"""Run a model one decoder layer at a time, so that only one is ever resident.

A first pass sends one batch through the whole model, materialising each layer as it is reached. It
records how every layer is called (masks, positions, rotary tables: whatever this architecture
passes) and which linears are given the same input. After it, layers can be applied to the hidden
states of all batches, one layer after another, without the model around them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.configs.errors import ModelError


@dataclass(frozen=True)
class LayerCall:
    """How a decoder layer is called, apart from its hidden states, and who shares an input in it.

    `groups` lists the linears (full names) of each distinct input, in order of use;
    `returns_tuple` says whether the hidden states come back in one.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool
    groups: list[list[str]]
    returns_tuple: bool = False


class _Reached(Exception):
    """Carries the hidden states out of a forward that has come to the first layer."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class LayerStream:
    """A model whose layers visit the device in turn.

    Parameters
    ----------
    architecture : Architecture
        Its skeleton is filled and emptied in place.
    reader : WeightReader
    device : str
    dtype : torch.dtype
        Precision of the computation.
    """

    def __init__(
        self, architecture: Architecture, reader: WeightReader, *, device: str, dtype: torch.dtype
    ) -> None:
        self._architecture, self._reader = architecture, reader
        self.device, self._dtype = device, dtype
        head = architecture.model.get_output_embeddings()
        self._heads = [n for n, module in architecture.model.named_modules() if module is head]

    @contextmanager
    def around_layers(self, *, head: bool = False) -> Iterator[None]:
        """Hold everything outside the layers (embeddings, norms, rotary tables) on the device.

        The head, which no layer needs and which can be larger than a layer, only if asked.
        """
        skip = [*self._architecture.layer_names, *([] if head else self._heads)]
        self._reader.fill_("", device=self.device, dtype=self._dtype, skip=skip)
        try:
            yield
        finally:
            self._reader.empty_("", skip=skip)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Hold one decoder layer on the device."""
        name = self._architecture.layer_names[index]
        self._reader.fill_(name, device=self.device, dtype=self._dtype)
        try:
            yield self._architecture.layers[index]
        finally:
            self._reader.empty_(name)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input of the first layer, [n, length, d_model], for tokens [n, length]."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        first = self._architecture.layers[0]
        hook = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._forward(tokens)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise ModelError("model: its forward never calls the first decoder layer")

    def logits(self, hidden: Tensor, tokens: Tensor, call: LayerCall) -> Tensor:
        """Return what the model predicts, [n, length, vocabulary], from its last layer's output.

        Differentiable in `hidden` [n, length, d_model]. It is the model's own forward, with its
        layers passing `hidden` on: whatever an architecture does behind them (norms, scaling,
        soft-capping) is done. Needs ``around_layers(head=True)``.

        Parameters
        ----------
        tokens : Tensor, shape [n, length]
        call : LayerCall
            Of the last layer.
        """
        layers = self._architecture.layers
        passed = (hidden,) if call.returns_tuple else hidden
        for layer in layers:
            layer.forward = lambda *_, **__: passed
        try:
            model = self._architecture.model
            result: Tensor = model(input_ids=tokens.to(self.device), use_cache=False).logits
        finally:
            for layer in layers:
                del layer.forward  # the class's own shows again
        return result

    @torch.no_grad()
    def trace(self, tokens: Tensor) -> list[LayerCall]:
        """Send one batch through all layers and record how each is called."""
        calls: dict[int, LayerCall] = {}
        hooks: list[Any] = []
        for index, layer in enumerate(self._architecture.layers):
            hooks += _record_call(self, index, layer, calls)
        try:
            self._forward(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != len(self._architecture.layers):
            raise ModelError("model: its forward does not call every decoder layer")
        return [calls[index] for index in range(len(calls))]

    def _forward(self, tokens: Tensor) -> None:
        self._architecture.model.base_model(input_ids=tokens.to(self.device), use_cache=False)


def apply(layer: nn.Module, call: LayerCall, hidden: Tensor) -> Tensor:
    """Apply one decoder layer to hidden states [n, length, d_model], as its model would."""
    if call.by_keyword:
        out = layer(*call.args, hidden_states=hidden, **call.kwargs)
    else:
        out = layer(hidden, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@contextmanager
def watch_inputs(
    layer: nn.Module, prefix: str, names: list[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, x)`` whenever a linear of the layer is about to be applied to ``x``."""

    def hook_for(name: str) -> Callable[..., None]:
        return lambda _, args: see(name, args[0])

    hooks = [
        layer.get_submodule(name.removeprefix(f"{prefix}.")).register_forward_pre_hook(
            hook_for(name)
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watch_outputs(
    layer: nn.Module,
    prefix: str,
    names: list[str],
    see: Callable[[str, Tensor, Tensor], None],
) -> Iterator[None]:
    """Call ``see(name, x, y)`` whenever a linear of the layer has made ``y`` of ``x``."""

    def hook_for(name: str) -> Callable[..., None]:
        return lambda _, args, y: see(name, args[0], y)

    hooks = [
        # Before hooks that belong to the model, and add to what a linear puts out.
        layer.get_submodule(name.removeprefix(f"{prefix}.")).register_forward_hook(
            hook_for(name), prepend=True
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _record_call(
    stream: LayerStream, index: int, layer: nn.Module, calls: dict[int, LayerCall]
) -> list[Any]:
    """Attach hooks that materialise a layer around its call and write down what happens."""
    name = stream._architecture.layer_names[index]
    residents: list[Any] = []
    inputs: list[tuple[Tensor, list[str]]] = []  # tensors are kept: a freed one's id may come back

    def see(linear: str, x: Tensor) -> None:
        for known, members in inputs:
            if known is x or (
                known.data_ptr() == x.data_ptr()
                and known.shape == x.shape
                and known.stride() == x.stride()
            ):
                members.append(linear)
                return
        inputs.append((x, [linear]))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_keyword = not args
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls[index] = LayerCall(args[1:], rest, by_keyword, [])
        linears = [lin.name for lin in stream._architecture.linears if lin.layer == index]
        for context in (stream.layer(index), watch_inputs(layer, name, linears, see)):
            context.__enter__()
            residents.append(context)

    def after(_: nn.Module, __: Any, out: Any) -> None:
        while residents:
            residents.pop().__exit__(None, None, None)
        groups = [members for _, members in inputs]
        calls[index] = replace(calls[index], groups=groups, returns_tuple=isinstance(out, tuple))
        inputs.clear()

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after),
    ]
