"""Run a model one decoder layer at a time, with only that layer's weights in memory.

A trace first sends one batch through the whole model, loading each layer as it is reached. It
records how every layer is called (masks, positions, rotary tables: whatever the architecture
passes) and which linears share an input. After that, layers can be applied to the hidden states of
all batches, layer by layer, without the model around them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.configs.errors import ModelError

# Enough tokens a batch to keep matrix products efficient, few enough to keep attention small.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass
class LayerCall:
    """How the model calls one decoder layer, apart from its hidden states."""

    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """Number of windows in a batch -> (args, kwargs): masks may have the shape of the batch."""
    by_keyword: bool = False
    """Whether the hidden states are passed as a keyword."""
    groups: list[list[str]] = field(default_factory=list)
    """Full names of the linears of each distinct input, in order of use."""
    returns_tuple: bool = False
    """Whether the layer returns a tuple that starts with the hidden states."""


class _FirstLayerReached(Exception):
    """Ends a forward at the first decoder layer and carries the layer's input."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class LayerExecutor:
    """A model whose decoder layers are loaded one at a time, to compute in `dtype` on `device`.

    The skeleton of `architecture` is filled and emptied in place.
    """

    def __init__(
        self, architecture: Architecture, reader: WeightReader, *, device: str, dtype: torch.dtype
    ) -> None:
        self.architecture, self._reader = architecture, reader
        self.device, self._dtype = device, dtype
        head = architecture.model.get_output_embeddings()
        self._heads = [n for n, module in architecture.model.named_modules() if module is head]

    @contextmanager
    def around_layers(self, *, head: bool = False) -> Iterator[None]:
        """Load everything outside the layers (embeddings, norms, rotary tables).

        The output embedding, which can be larger than a layer, is loaded only if `head`.
        """
        skip = [*self.architecture.layer_names, *([] if head else self._heads)]
        self._reader.fill_("", device=self.device, dtype=self._dtype, skip=skip)
        try:
            yield
        finally:
            self._reader.empty_("", skip=skip)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load one decoder layer."""
        name = self.architecture.layer_names[index]
        self._reader.fill_(name, device=self.device, dtype=self._dtype)
        try:
            yield self.architecture.layers[index]
        finally:
            self._reader.empty_(name)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input of the first layer, [n, length, d_model], for tokens [n, length]."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _FirstLayerReached(args[0] if args else kwargs["hidden_states"])

        first = self.architecture.layers[0]
        try:
            with first.register_forward_pre_hook(stop, with_kwargs=True):
                self._forward(tokens)
        except _FirstLayerReached as reached:
            return reached.hidden
        raise ModelError("model: its forward never calls the first decoder layer")

    def logits(self, hidden: Tensor, tokens: Tensor, call: LayerCall) -> Tensor:
        """Return the logits [n, length, vocabulary] for the output of the last layer.

        Differentiable in `hidden` [n, length, d_model]. Runs the model's own forward with its
        layers replaced by the constant `hidden`, so that whatever follows the layers (norms,
        scaling, soft-capping) is applied. Needs ``around_layers(head=True)``. `call` is that of
        the last layer.
        """
        passed = (hidden,) if call.returns_tuple else hidden
        with self._layers_replaced(lambda *_, **__: passed):
            model = self.architecture.model
            result: Tensor = model(input_ids=tokens.to(self.device), use_cache=False).logits
        return result

    @torch.no_grad()
    def trace(self, tokens: Tensor, batch: int) -> list[LayerCall]:
        """Run the first `batch` windows through all layers and record how each is called.

        If the last batch of the windows `tokens` [n_windows, length] is smaller, the model is run
        for it too, with layers that return their input: the arguments have other shapes, but no
        weight is needed.
        """
        layers = self.architecture.layers
        calls = [LayerCall() for _ in layers]
        with ExitStack() as hooks, ExitStack() as loaded:
            for index, call in enumerate(calls):
                self._trace_layer(index, call, hooks, loaded)
            self._forward(tokens[:batch])
        if not all(call.arguments for call in calls):
            raise ModelError("model: its forward does not call every decoder layer")
        if rest := len(tokens) % batch:
            in_tuple = calls[-1].returns_tuple

            def identity(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                return (hidden,) if in_tuple else hidden

            with ExitStack() as hooks, self._layers_replaced(identity):
                for layer, call in zip(layers, calls, strict=True):
                    hooks.enter_context(_record_arguments(layer, call))
                self._forward(tokens[-rest:])
        return calls

    def _trace_layer(
        self, index: int, call: LayerCall, hooks: ExitStack, loaded: ExitStack
    ) -> None:
        """Attach hooks that load a layer around its call and record the inputs of its linears."""
        name, layer = self.architecture.layer_names[index], self.architecture.layers[index]
        linears = [lin.name for lin in self.architecture.linears if lin.layer == index]
        inputs: list[tuple[Tensor, list[str]]] = []  # keeps tensors: a freed one's id may return

        def see(linear: str, x: Tensor) -> None:
            view = x.data_ptr(), x.shape, x.stride()
            for known, members in inputs:
                if known is x or (known.data_ptr(), known.shape, known.stride()) == view:
                    members.append(linear)
                    return
            inputs.append((x, [linear]))

        def load(*_: Any) -> None:
            loaded.enter_context(self.layer(index))
            loaded.enter_context(watch_inputs(layer, name, linears, see))

        def unload(_: nn.Module, __: Any, out: Any) -> None:
            loaded.close()
            call.groups = [members for _, members in inputs]
            call.returns_tuple = isinstance(out, tuple)
            inputs.clear()

        hooks.enter_context(_record_arguments(layer, call))
        hooks.enter_context(layer.register_forward_pre_hook(load))
        hooks.enter_context(layer.register_forward_hook(unload))

    @contextmanager
    def _layers_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Let `forward` compute in place of every decoder layer."""
        layers = self.architecture.layers
        before = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.forward  # the class's own is visible again
                if own is not None:
                    layer.forward = own

    def _forward(self, tokens: Tensor) -> None:
        self.architecture.model.base_model(input_ids=tokens.to(self.device), use_cache=False)


def _record_arguments(layer: nn.Module, call: LayerCall) -> RemovableHandle:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.by_keyword = not args
        hidden = kwargs["hidden_states"] if call.by_keyword else args[0]
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        call.arguments[len(hidden)] = args[1:], rest

    return layer.register_forward_pre_hook(record, with_kwargs=True)


def apply(layer: nn.Module, call: LayerCall, hidden: Tensor) -> Tensor:
    """Apply one decoder layer to hidden states [n, length, d_model], as its model would."""
    args, kwargs = call.arguments[len(hidden)]
    if call.by_keyword:
        out = layer(*args, hidden_states=hidden, **kwargs)
    else:
        out = layer(hidden, *args, **kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def batch_size(n_windows: int, length: int, device: str) -> int:
    """Return how many windows to process together; the last batch may be smaller."""
    limit = BATCH_TOKENS["cuda" if device.startswith("cuda") else "cpu"] // length
    return min(max(1, limit), n_windows)


def batches(n_windows: int, batch: int) -> Iterator[slice]:
    """Yield the windows of each batch."""
    for start in range(0, n_windows, batch):
        yield slice(start, start + batch)


def watch_inputs(
    layer: nn.Module, prefix: str, names: list[str], see: Callable[[str, Tensor], None]
) -> ExitStack:
    """Call ``see(name, x)`` before a linear of the layer is applied to ``x``, within the context.

    `names` are full names, which start with the layer's name `prefix`.
    """
    hooks = ExitStack()
    for name in names:
        linear = layer.get_submodule(name.removeprefix(f"{prefix}."))
        hook = partial(lambda name, _, args: see(name, args[0]), name)
        hooks.enter_context(linear.register_forward_pre_hook(hook))
    return hooks


def watch_outputs(
    layer: nn.Module, prefix: str, names: list[str], see: Callable[[str, Tensor, Tensor], None]
) -> ExitStack:
    """Call ``see(name, x, y)`` after a linear has returned ``y``; otherwise as `watch_inputs`.

    Runs before hooks that belong to the model, which may add to a linear's output.
    """
    hooks = ExitStack()
    for name in names:
        linear = layer.get_submodule(name.removeprefix(f"{prefix}."))
        hook = partial(lambda name, _, args, y: see(name, args[0], y), name)
        hooks.enter_context(linear.register_forward_hook(hook, prepend=True))
    return hooks
