"""How a model calls its decoder layers: recorded, and with other layers in their place."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Received:
    """An argument of a layer that the layer returns again, by its position or name."""

    key: int | str

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument of a call."""
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]


@dataclass
class LayerCall:
    """How the model calls one decoder layer, apart from its hidden states."""

    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """Number of windows in a batch -> (args, kwargs): masks may have the shape of the batch. Of an
    encoder, by the first row of the batch instead."""
    by_keyword: bool = False
    """Whether the hidden states are passed as a keyword."""
    groups: list[list[str]] = field(default_factory=list)
    """Full names of the linears of each distinct input, in order of use."""
    others: tuple[Any, ...] | None = None
    """What the layer returns after the hidden states, if it returns a tuple: `Received`, or a value
    for the first batch."""
    d_model: int = 0

    def run(
        self, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the hidden states that a layer computes from others and recorded arguments."""
        if self.by_keyword:
            out = layer(*args, hidden_states=hidden, **kwargs)
        else:
            out = layer(hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def returned_with_states(
    out: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return what a layer returned after the hidden states, with its arguments as `Received`."""
    received: dict[int, int | str] = {id(x): number for number, x in enumerate(args)}
    received |= {id(x): name for name, x in kwargs.items()}
    return tuple(
        Received(received[id(x)]) if isinstance(x, Tensor) and id(x) in received else x
        for x in out[1:]
    )


def record_arguments(
    layer: nn.Module,
    call: LayerCall,
    key: int | None = None,
    stored: Callable[[Any], Any] = lambda argument: argument,
) -> RemovableHandle:
    """Write into `call` how a layer is called, until the handle is removed.

    By default, the key is the number of windows. `stored` maps every argument but the hidden states
    to what is recorded in its place.
    """

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.by_keyword = not args
        hidden = kwargs["hidden_states"] if call.by_keyword else args[0]
        rest = {key: stored(value) for key, value in kwargs.items() if key != "hidden_states"}
        values = tuple(stored(value) for value in args[1:])
        call.arguments[len(hidden) if key is None else key] = values, rest
        call.d_model = hidden.shape[-1]

    return layer.register_forward_pre_hook(record, with_kwargs=True)


def first_argument(*args: Any, **kwargs: Any) -> Any:
    """Return the hidden states that a layer receives."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def layers_replaced(
    layers: Sequence[Any],
    calls: Sequence[LayerCall],
    forward: Callable[..., Tensor],
    *,
    keep: Collection[int] = (),
) -> Iterator[None]:
    """Let `forward` compute the hidden states in place of every layer but those in `keep`."""
    layers = [layer for index, layer in enumerate(layers) if index not in keep]
    calls = [call for index, call in enumerate(calls) if index not in keep]
    before = [vars(layer).get("forward") for layer in layers]

    def replaced(others: tuple[Any, ...] | None) -> Callable[..., Any]:
        if others is None:
            return forward

        def result(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            rest = (x.of(args, kwargs) if isinstance(x, Received) else x for x in others)
            return forward(*args, **kwargs), *rest

        return result

    for layer, call in zip(layers, calls, strict=True):
        layer.forward = replaced(call.others)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward  # the class's own is visible again
            if own is not None:
                layer.forward = own


def watch(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor, Tensor], None]
) -> ExitStack:
    """Call ``see(name, x, y)`` after a module has returned ``y`` for ``x``, within the context.

    Runs before hooks that belong to the model, which may add to a linear's output.
    """
    hooks = ExitStack()
    for name in names:
        hook = partial(lambda name, _, args, y: see(name, args[0], y), name)
        module = model.get_submodule(name)
        hooks.enter_context(module.register_forward_hook(hook, prepend=True))
    return hooks
