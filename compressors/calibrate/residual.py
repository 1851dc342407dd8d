"""Find the linears of a decoder layer that write to its residual stream, and silence them.

No family is listed. A linear writes to the stream if silencing it removes exactly its output from
the layer's output. A norm or a factor in between, as some families have, shows as a difference.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

TOLERANCE = 1e-2  # relative; rounding of large hidden states is below it, any factor is above it


@torch.no_grad()
def find_writers(
    forward: Callable[[], Tensor], linears: Sequence[tuple[str, nn.Module]]
) -> list[str]:
    """Return which of a layer's linears add their output to the hidden states unchanged.

    Parameters
    ----------
    forward : callable
        Applies the layer to some tokens; returns its output.
    linears : sequence of (str, Module)
        In order of use.
    """
    found: dict[str, nn.Module] = {}
    for name, linear in reversed(linears):
        outputs: list[Tensor] = []

        def see(_: nn.Module, __: object, y: Tensor, seen: list[Tensor] = outputs) -> None:
            seen.append(y)

        with linear.register_forward_hook(see, prepend=True), silenced(found.values()):
            whole = forward()
        if len(outputs) != 1 or outputs[0].numel() != whole.numel() or not bool(outputs[0].any()):
            continue
        y = outputs[0].reshape(whole.shape)  # some flatten all tokens into one dimension
        with silenced([linear, *found.values()]):
            missing = whole - forward() - y
        if float(missing.norm()) <= TOLERANCE * float(y.norm()):
            found[name] = linear
    return [name for name, _ in linears if name in found]


def silenced(linears: Iterable[nn.Module]) -> ExitStack:
    """Let linears return zeros within the context; the model's own hooks still run after."""
    hooks = ExitStack()
    for linear in linears:
        hook = linear.register_forward_hook(lambda _, __, y: torch.zeros_like(y), prepend=True)
        hooks.enter_context(hook)
    return hooks
