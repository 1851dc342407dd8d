"""Run an encoder-decoder model one layer at a time.

The hidden states of both stacks are columns of one buffer [n, n_source + n_target, d_model]: first
those of the source text, then those of the target. A layer of the encoder replaces the first
columns. After the last one, whatever the encoder computes after its layers (such as a norm) is
applied to them too. They stay unchanged from then on, and layers of the decoder, which replace the
other columns, read them in their cross-attention. In a backward pass, the gradients of the source
columns are therefore sums over all layers of the decoder, without any special case.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_calls import (
    LayerCall,
    first_argument,
    layers_replaced,
    record_arguments,
)
from lrc.compressors.calibrate.layer_executor import ForwardEnded, LayerExecutor
from lrc.compressors.corpus.pairs import Pairs
from lrc.compressors.io.device_copies import copy_, on_device
from lrc.compressors.io.freed_memory import drop_shared_pages

SOURCE = "source"
"""In the place of the output of the encoder among the recorded arguments of a layer."""


def executor_of(context: CalibrationContext, **options: Any) -> LayerExecutor:
    """Return the executor for the kind of model of a context; `options` are its other arguments."""
    translates = context.architecture.kind.translates
    return (EncoderDecoderExecutor if translates else LayerExecutor)(context, **options)


class EncoderDecoderExecutor(LayerExecutor):
    """An encoder-decoder model that computes on pairs of texts, one layer at a time.

    Parameters
    ----------
    context : CalibrationContext
        With pairs as its sentences.
    options
        As of `LayerExecutor`.
    """

    sentences: Pairs

    def __init__(self, context: CalibrationContext, **options: Any) -> None:
        super().__init__(context, **options)
        model, names = self.architecture.model, self.architecture.layer_names
        self._encoder = model.get_encoder()
        self._name = next(name for name, each in model.named_modules() if each is self._encoder)
        words = None
        with suppress(AttributeError, NotImplementedError):  # not every encoder has the method
            words = self._encoder.get_input_embeddings()
        self._unneeded = [n for n, each in model.named_modules() if each is words]
        self._unneeded += names[: self.architecture.n_encoder]
        self._encoded: Tensor | None = None
        """Output of the encoder while the model is traced."""
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        """By id, tensors that layers have received in the present batch, and what is recorded."""
        self._first_seen: list[Tensor] = []
        """Those of the first batch."""

    def columns(self, index: int) -> slice:
        """Return the positions of the hidden states that a layer replaces."""
        n = self.sentences.n_source
        return slice(0, n) if index < self.architecture.n_encoder else slice(n, None)

    @contextmanager
    def layer(self, index: int, *, again: bool = False) -> Iterator[nn.Module]:
        """Load one layer; with the last one of the encoder, also what follows its layers."""
        with ExitStack() as stack:
            if index == self.architecture.n_encoder - 1:
                stack.enter_context(self._filled(self._name, self._unneeded))
            yield stack.enter_context(self._layer_alone(index, again=again))

    @torch.no_grad()
    def embed_resident_(self, states: Tensor) -> None:
        """Fill states [n, n_source + n_target, d_model] with the inputs of the first layers."""
        firsts = (0, self.architecture.n_encoder)

        def keep(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                copy_(states[present[0], self.columns(index)], first_argument(*args, **kwargs))
                if index > 0:
                    raise ForwardEnded

            return hook

        present: list[slice] = []
        with (
            ExitStack() as hooks,
            layers_replaced(self.architecture.layers, self.calls, first_argument),
        ):
            for index in firsts:
                layer = self.architecture.layers[index]
                hooks.enter_context(layer.register_forward_pre_hook(keep(index), with_kwargs=True))
            for rows in self.batches:
                present[:] = [rows]
                self._forward(self.tokens[rows], rows)
                drop_shared_pages(states[rows])

    def apply(
        self,
        index: int,
        hidden: Tensor,
        layer: nn.Module | None = None,
        *,
        rows: slice | None = None,
    ) -> Tensor:
        """Apply a resident layer to the hidden states [n, n_source + n_target, d_model].

        `rows` must be one of the batches. For `layer`, see `LayerExecutor.apply`.
        """
        n = self.sentences.n_source
        hidden = on_device(hidden, self.context.device, self.dtype)
        own = self._run(index, hidden, layer, rows)
        if index >= self.architecture.n_encoder:
            return torch.cat([hidden[:, :n], own], dim=1)
        if index == self.architecture.n_encoder - 1:
            assert rows is not None
            own = self._finished(own, rows)
        return torch.cat([own, hidden[:, n:]], dim=1)

    def stream(self, index: int, hidden: Tensor, *, rows: slice) -> Tensor:
        """Return what a resident layer itself returns: [n, n_source or n_target, d_model].

        For the last layer of the encoder, this is before the modules that follow it.
        """
        return self._run(index, hidden, None, rows)

    def _run(
        self, index: int, hidden: Tensor, layer: nn.Module | None, rows: slice | None
    ) -> Tensor:
        call, n = self.calls[index], self.sentences.n_source
        layer = self.architecture.layers[index] if layer is None else layer
        args, kwargs = call.arguments[self._key(hidden, rows)]
        hidden = on_device(hidden, self.context.device, self.dtype)
        source = hidden[:, :n]
        args = tuple(source if x is SOURCE else x for x in args)
        kwargs = {key: source if x is SOURCE else x for key, x in kwargs.items()}
        return call.run(layer, hidden[:, self.columns(index)], args, kwargs)

    def _finished(self, source: Tensor, rows: slice) -> Tensor:
        """Return the output of the encoder for that of its last layer [n, n_source, d_model]."""
        mask = self.sentences[rows].source_mask.long().to(source.device)
        with layers_replaced(self.architecture.layers, self.calls, lambda *_, **__: source):
            encoded: Tensor = self._encoder(inputs_embeds=source, attention_mask=mask)[0]
        return encoded

    def _constant(self, hidden: Tensor) -> Callable[..., Tensor]:
        n = self.sentences.n_source

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            of_source = first_argument(*args, **kwargs).shape[1] == n
            return hidden[:, :n] if of_source else hidden[:, n:]

        return forward

    @contextmanager
    def _replaced_in_trace(self, calls: Sequence[LayerCall]) -> Iterator[None]:
        """Apply layers that make arguments of others, such as the position bias of T5.

        All others return their inputs.
        """
        makers = [
            index
            for index, call in enumerate(calls)
            if any(isinstance(each, Tensor) for each in call.others or ())
        ]
        with ExitStack() as stack:
            stack.enter_context(
                layers_replaced(self.architecture.layers, calls, first_argument, keep=makers)
            )
            for index in makers:
                stack.enter_context(self._layer_alone(index))
            yield

    def _recorded(self, layer: nn.Module, call: LayerCall, key: int) -> RemovableHandle:
        def stored(argument: Any) -> Any:
            encoded = self._encoded
            if not isinstance(argument, Tensor):
                return argument
            if encoded is not None and _same(encoded, argument):
                return SOURCE
            if id(argument) not in self._seen:
                self._seen[id(argument)] = argument, self._known(argument)
            return self._seen[id(argument)][1]

        return record_arguments(layer, call, key, stored)

    def _known(self, argument: Tensor) -> Tensor:
        """Return an equal argument of the first batch, so that what all share is kept once.

        The position bias of T5 is as large as the attention weights of all heads.
        """
        for known in self._first_seen:
            if known.shape == argument.shape and torch.equal(known, argument):
                return known
        return argument

    def _forward(self, tokens: Tensor, rows: slice) -> None:
        """Run the model on some pairs, up to its last layer: the head is not in memory."""
        self._encoded = None

        def see(_: nn.Module, __: Any, out: Any) -> None:
            self._encoded = out[0]

        def end(*_: Any) -> None:
            raise ForwardEnded

        with (
            self._encoder.register_forward_hook(see),
            self.architecture.layers[-1].register_forward_hook(end),
            suppress(ForwardEnded),
        ):
            super()._forward(tokens, rows)
        if not self._first_seen:
            self._first_seen = [argument for argument, _ in self._seen.values()]
        self._encoded, self._seen = None, {}


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same numbers in memory."""
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()
