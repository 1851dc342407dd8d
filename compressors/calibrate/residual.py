"""Which linears of a decoder layer write to its residual stream, and that stream without them.

Nothing is declared by family. A linear writes to the stream if the layer's output without it lacks
just what it puts out; a norm or a factor on the way, as some families have, shows and rules it out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOLERANCE = 1e-2  # relative; rounding of large hidden states is below it, any factor is above it


@torch.no_grad()
def find_writers(
    forward: Callable[[], Tensor], linears: Sequence[tuple[str, nn.Module]]
) -> list[str]:
    """Return which of a layer's linears add their output to the hidden states, as it is.

    Parameters
    ----------
    forward : callable
        Applies the layer to some tokens; returns its output.
    linears : sequence of (str, Module)
        In the order of their use.
    """
    found: dict[str, nn.Module] = {}
    for name, linear in reversed(linears):
        outputs: list[Tensor] = []
        hook = linear.register_forward_hook(
            lambda _, __, y, seen=outputs: seen.append(y), prepend=True
        )
        try:
            with silenced(found.values()):
                whole = forward()
        finally:
            hook.remove()
        if len(outputs) != 1 or outputs[0].numel() != whole.numel() or not bool(outputs[0].any()):
            continue
        y = outputs[0].reshape(whole.shape)  # some see all tokens in one dimension
        with silenced([linear, *found.values()]):
            missing = whole - forward() - y
        if float(missing.norm()) <= TOLERANCE * float(y.norm()):
            found[name] = linear
    return [name for name, _ in linears if name in found]


@contextmanager
def silenced(linears: Iterable[nn.Module]) -> Iterator[None]:
    """Let some linears put out zeros; hooks that belong to the model add to them what they do."""
    hooks = [
        linear.register_forward_hook(lambda _, __, y: torch.zeros_like(y), prepend=True)
        for linear in linears
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
