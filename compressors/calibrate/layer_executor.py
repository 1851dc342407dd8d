"""Run a model one decoder layer at a time, with only that layer's weights in memory.

A trace first sends one batch through the whole model. It records how every layer is called (masks,
positions, rotary tables: whatever the architecture passes) and which linears share an input. After
that, layers can be applied to the hidden states of all batches, layer by layer, without the model
around them. Encoders have another mask in every batch, and their calls are recorded for each.

The trace runs the layers to find out which linears share an input and what the layers return. If
`layer_check` has found both in a model without weights (`Architecture.plain_layers`), the layers
are neither loaded nor run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrc.compressors.calibrate.activation_cache import ActivationCache, Shape
from lrc.compressors.calibrate.batch_size import batch_tokens as usual_batch
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_calls import (
    LayerCall,
    first_argument,
    layers_replaced,
    record_arguments,
    returned_with_states,
    watch,
)
from lrc.compressors.calibrate.resident_modules import ResidentModules
from lrc.compressors.evaluate.encoder_outputs import sentence_outputs
from lrc.compressors.io.device_copies import copy_, on_device
from lrc.compressors.io.freed_memory import drop_shared_pages
from lrc.configs.errors import ModelError


class ForwardEnded(Exception):
    """Ends a forward at the module whose input is needed."""


class LayerExecutor(ResidentModules):
    """A model that computes on the calibration windows, one decoder layer at a time.

    The skeleton of the context's architecture is filled and emptied in place.

    Parameters
    ----------
    context : CalibrationContext
        Its processes divide the batches of windows.
    batch_tokens : int, optional
        Tokens in a batch, at most.
    in_turn : bool
        Whether processes take batches in turn, instead of consecutive ones.
    """

    def __init__(
        self,
        context: CalibrationContext,
        *,
        batch_tokens: int | None = None,
        in_turn: bool = False,
    ) -> None:
        super().__init__(context)
        self.sentences = context.sentences() if context.sentences is not None else None
        """Texts with padding, of an encoder or an encoder-decoder model, in a single process."""
        windows, processes = context.windows(), context.processes
        if batch_tokens is None:
            batch_tokens = usual_batch(context.architecture, context.device_type, *windows.shape)
        every = batches(windows, batch_tokens)
        own = processes.turn(len(every)) if in_turn else processes.block(len(every))
        self.n_tokens = windows.numel() if self.sentences is None else self.sentences.n_tokens
        """Of all processes, without padding."""
        self.n_batches = len(every)
        """Of all processes."""
        self.numbers = [n for each in own for n in range(len(windows))[every[each]]]
        """Of the windows of this process, among all."""
        self.tokens = windows[self.numbers]
        """Windows of this process [n_windows, length]."""
        self.batches = batches(self.tokens, batch_tokens)
        """Of this process."""
        self._first, self._traced = every[0], windows[every[0]]

    @cached_property
    def calls(self) -> list[LayerCall]:
        """The calls of all layers, from a trace at the first access."""
        return self.trace()

    @property
    def shape(self) -> Shape:
        """Shape of the hidden states: [n_windows, length, d_model]."""
        n_windows, length = self.tokens.shape
        return n_windows, length, self.calls[0].d_model

    @property
    def window(self) -> int | None:
        """Tokens per window; None if they differ in length."""
        return self.tokens.shape[1] if self.sentences is None else None

    def without_padding(self, x: Tensor, rows: slice) -> Tensor:
        """Return ``x`` [..., d] of a batch as [n_tokens, d], without padding.

        If there is none, `x` is returned as it is.
        """
        if self.sentences is None:
            return x
        mask = self.sentences[rows].mask_of(x).to(x.device)
        return x.reshape(*mask.shape, -1)[mask]  # some models flatten the windows

    def columns(self, index: int) -> slice:
        """Return the positions of the hidden states that a layer replaces: here, all."""
        return slice(None)

    def pieces(self, most: int) -> list[slice]:
        """Split every batch into pieces of at most `most` tokens, or of one window."""
        return [
            slice(rows.start + piece.start, min(rows.start + piece.stop, rows.stop))
            for rows in self.batches
            for piece in batches(self.tokens[rows], most)
        ]

    @torch.no_grad()
    def embed_(self, states: Tensor) -> None:
        """Fill states [n_windows, length, d_model] with the input of the first layer."""
        with self.around_layers(ahead=0):
            self.embed_resident_(states)

    @torch.no_grad()
    def embed_resident_(self, states: Tensor) -> None:
        """Do the same as `embed_`, within `around_layers`."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            copy_(states[rows], first_argument(*args, **kwargs))
            raise ForwardEnded

        first = self.architecture.layers[0]
        with first.register_forward_pre_hook(stop, with_kwargs=True):
            for rows in self.batches:
                with suppress(ForwardEnded):
                    self._forward(self.tokens[rows], rows)
                drop_shared_pages(states[rows])

    def embedded(self, name: str = "states") -> Tensor:
        """Return the input of the first layer in the buffer of a new activation cache."""
        states = ActivationCache(self.context, name, self.shape).tensor
        self.embed_(states)
        return states

    def outputs(self, hidden: Tensor, rows: slice) -> Tensor:
        """Return the outputs for some texts with padding, from the output of the last layer.

        Differentiable in `hidden` [n, length, d_model]; see `logits`.

        Returns
        -------
        Tensor
            See `sentence_outputs`.
        """
        assert self.sentences is not None
        part, model, device = self.sentences[rows], self.architecture.model, self.context.device
        with layers_replaced(self.architecture.layers, self.calls, self._constant(hidden)):
            return sentence_outputs(model, part, self.architecture.kind, device)

    def _constant(self, hidden: Tensor) -> Callable[..., Tensor]:
        """Return a forward that gives some hidden states, whatever its arguments are."""
        return lambda *_, **__: hidden

    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits [n, length, vocabulary] for the output of the last layer.

        Differentiable in `hidden` [n, length, d_model]. Runs the model's own forward with its
        layers replaced by the constant `hidden`, so that whatever follows the layers (norms,
        scaling, soft-capping) is applied. Needs ``around_layers(head=True)``.
        """
        with layers_replaced(self.architecture.layers, self.calls, lambda *_, **__: hidden):
            model, ids = self.architecture.model, tokens.to(self.context.device)
            result: Tensor = model(input_ids=ids, use_cache=False).logits
        return result

    def apply(
        self,
        index: int,
        hidden: Tensor,
        layer: nn.Module | None = None,
        *,
        rows: slice | None = None,
    ) -> Tensor:
        """Apply a resident layer to hidden states [n, length, d_model], as its model would.

        Another `layer` with the same signature can take its place. Of an encoder, `rows` must be
        one of the batches.
        """
        call = self.calls[index]
        layer = self.architecture.layers[index] if layer is None else layer
        args, kwargs = call.arguments[self._key(hidden, rows)]
        hidden = on_device(hidden, self.context.device, self.dtype)
        return call.run(layer, hidden, args, kwargs)

    def stream(self, index: int, hidden: Tensor, *, rows: slice) -> Tensor:
        """Return what a resident layer itself returns for its part of the hidden states.

        Here, the same as `apply`.
        """
        return self.apply(index, hidden, rows=rows)

    @torch.no_grad()
    def advance_(self, index: int, states: Tensor, layer: nn.Module | None = None) -> None:
        """Replace the states [n_windows, length, d_model] by the output of a resident layer.

        For `layer`, see `apply`.
        """
        for rows in self.batches:
            self.advance_batch_(index, states, rows, layer)

    @torch.no_grad()
    def advance_batch_(
        self, index: int, states: Tensor, rows: slice, layer: nn.Module | None = None
    ) -> None:
        """Do the same as `advance_` for one of the batches."""
        copy_(states[rows], self.apply(index, states[rows], layer, rows=rows))
        drop_shared_pages(states[rows])

    @torch.no_grad()
    def trace(self) -> list[LayerCall]:
        """Run the first batch of all processes through all layers and record how each is called.

        If the last batch is smaller, the model is run for it too, with layers that return their
        input: the arguments have other shapes, but no weight is needed. So it is for every batch of
        an encoder.
        """
        if self.architecture.plain_layers:
            calls = []
            for index, groups in enumerate(self.architecture.groups):
                own = self.linears(index)  # without those that cannot be replaced
                found = ([name for name in group if name in own] for group in groups)
                calls.append(LayerCall(groups=[group for group in found if group]))
            self._record(calls)
            return calls
        layers = self.architecture.layers
        calls = [LayerCall() for _ in layers]
        with self.around_layers(), ExitStack() as hooks, ExitStack() as loaded:
            for index, call in enumerate(calls):
                self._trace_layer(index, call, hooks, loaded)
            self._forward(self._traced, self._first)
            if not all(call.arguments for call in calls):
                raise ModelError("model: its forward does not call every decoder layer")
            hooks.close()
            with self._replaced_in_trace(calls):
                for rows in self.batches:
                    key = self._key(self.tokens[rows], rows)
                    if key in calls[0].arguments:
                        continue
                    with ExitStack() as recording:
                        for layer, call in zip(layers, calls, strict=True):
                            recording.enter_context(self._recorded(layer, call, key))
                        self._forward(self.tokens[rows], rows)
        for index, call in enumerate(calls):
            # Experts that received none of the first tokens; none shares its input.
            called = {name for group in call.groups for name in group}
            call.groups += [[name] for name in self.linears(index) if name not in called]
        return calls

    def _record(self, calls: Sequence[LayerCall]) -> None:
        """Record the arguments of all layers for the first and the last batch.

        Layers return their input, and what `calls` know of the rest. The arguments do not depend on
        weights, so that neither layers nor embeddings are read.
        """
        layers = self.architecture.layers
        with self._without_embedding(self._heads), ExitStack() as hooks:
            for layer, call in zip(layers, calls, strict=True):
                hooks.enter_context(record_arguments(layer, call))
            hooks.enter_context(layers_replaced(layers, calls, first_argument))
            self._forward(self._traced, self._first)
            for rows in self.batches[-1:]:
                self._forward(self.tokens[rows], rows)

    def _trace_layer(
        self, index: int, call: LayerCall, hooks: ExitStack, loaded: ExitStack
    ) -> None:
        """Attach hooks that load a layer around its call and record the inputs of its linears."""
        layer = self.architecture.layers[index]
        inputs: list[tuple[Tensor, list[str]]] = []  # keeps tensors: a freed one's id may return

        def see(linear: str, x: Tensor, _: Tensor) -> None:
            view = x.data_ptr(), x.shape, x.stride()
            for known, members in inputs:
                if known is x or (known.data_ptr(), known.shape, known.stride()) == view:
                    members.append(linear)
                    return
            inputs.append((x, [linear]))

        def load(*_: Any) -> None:
            loaded.enter_context(self._layer_alone(index))
            loaded.enter_context(watch(self.architecture.model, self.linears(index), see))

        def unload(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            loaded.close()
            call.groups = [members for _, members in inputs]
            call.others = (
                returned_with_states(out, args, kwargs) if isinstance(out, tuple) else None
            )
            inputs.clear()

        key = self._key(self._traced, self._first)
        hooks.enter_context(self._recorded(layer, call, key))
        hooks.enter_context(layer.register_forward_pre_hook(load))
        hooks.enter_context(layer.register_forward_hook(unload, with_kwargs=True))

    @contextmanager
    def _replaced_in_trace(self, calls: Sequence[LayerCall]) -> Iterator[None]:
        """Let layers return their inputs while the arguments for other batches are recorded."""
        with layers_replaced(self.architecture.layers, calls, first_argument):
            yield

    def _recorded(self, layer: nn.Module, call: LayerCall, key: int) -> RemovableHandle:
        """Record how a layer is called in the trace, until the handle is removed."""
        return record_arguments(layer, call, key)

    def _key(self, batch: Tensor, rows: slice | None) -> int:
        """Return the key of the arguments of a batch in `LayerCall.arguments`."""
        if self.sentences is None:
            return len(batch)
        assert rows is not None, "the masks of an encoder differ between batches"
        return int(rows.start)

    def _forward(self, tokens: Tensor, rows: slice) -> None:
        """Run the model on some windows; of an encoder, they are the texts `rows`."""
        device = self.context.device
        inputs: dict[str, Any] = {"input_ids": tokens.to(device)}
        if self.sentences is not None:
            inputs = {**self.sentences[rows].inputs(device)}
        if not self.architecture.kind.encoder:
            inputs["use_cache"] = False
        self.architecture.model.base_model(**inputs)


def batches(tokens: Tensor, most: int) -> list[slice]:
    """Split windows [n_windows, length] into batches of at most `most` tokens, or of one window."""
    n_windows, length = tokens.shape
    size = max(1, most // length)
    return [slice(start, start + size) for start in range(0, n_windows, size)]
