"""Which linear layers write to the residual stream, found without a table of model families.

A linear is a writer if replacing its output by zeros changes the output of its decoder layer by
exactly that output. If a norm or a multiplier follows, as in some architectures, the change
differs, and the linear is not a writer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

TOLERANCE = 1e-2  # relative; more than rounding causes, and less than a multiplier causes


@dataclass(frozen=True)
class Writers:
    """The linears of a decoder layer that write to the residual stream, in order of use."""

    names: list[str]
    add_to_input: bool = False
    """Whether the layer returns its input, number for number, without the outputs of all."""
    last_is_added: bool = False
    """Whether the output of the layer is, number for number, the sum of the output of the last one
    and what the layer returns without it."""

    def from_on(self, leader: str) -> list[str]:
        """Return `leader` and the writers after it; empty if it is none of them."""
        return self.names[self.names.index(leader) :] if leader in self.names else []


@torch.no_grad()
def writers_of(
    forward: Callable[[], Tensor], linears: Mapping[str, nn.Module], received: Tensor
) -> Writers:
    """Return the writers of a layer, and how its output is composed.

    Parameters
    ----------
    forward : callable
        Applies the layer to some tokens.
    linears : mapping of str to Module
        The linears of the layer, in order of use.
    received : Tensor, shape [n, length, d_model]
        What `forward` applies the layer to.
    """
    found = find_writers(forward, [*linears.items()])
    if not found:
        return Writers([])
    with silenced(linears[name] for name in found):
        nothing_added = forward()
    last, added = linears[found[-1]], list[Tensor]()
    with silenced([last]), kept_output(last, added):
        stream = forward()
    whole = stream + added[0].reshape(stream.shape)
    return Writers(
        found,
        add_to_input=torch.equal(nothing_added, received),
        last_is_added=torch.equal(forward(), whole),
    )


@torch.no_grad()
def find_writers(
    forward: Callable[[], Tensor], linears: Sequence[tuple[str, nn.Module]]
) -> list[str]:
    """Return which of a layer's linears add their output to the hidden states unchanged.

    `linears` are in order of use; `forward` applies the layer to some tokens.
    """
    found: dict[str, nn.Module] = {}
    # From last to first: without the outputs of later writers, an output reaches the end of the
    # layer only through the residual connection.
    for name, linear in reversed(linears):
        outputs: list[Tensor] = []
        with silenced(found.values()), kept_output(linear, outputs):
            whole = forward()
        if len(outputs) != 1 or outputs[0].numel() != whole.numel() or not bool(outputs[0].any()):
            continue
        y = outputs[0].reshape(whole.shape)  # some flatten all tokens into one dimension
        with silenced([linear, *found.values()]):
            unexplained = whole - forward() - y
        if float(unexplained.norm()) <= TOLERANCE * float(y.norm()):
            found[name] = linear
    return [name for name, _ in linears if name in found]


def silenced(linears: Iterable[nn.Module]) -> ExitStack:
    """Let linears return zeros within the context; the model's own hooks still run after."""
    hooks = ExitStack()
    for linear in linears:
        hook = linear.register_forward_hook(lambda _, __, y: torch.zeros_like(y), prepend=True)
        hooks.enter_context(hook)
    return hooks


def kept_output(linear: nn.Module, outputs: list[Tensor]) -> RemovableHandle:
    """Append what a linear returns to `outputs` within the context.

    Also of a linear that is `silenced`, if that context was entered before this one.
    """
    return linear.register_forward_hook(lambda _, __, y: outputs.append(y), prepend=True)
