"""The distance between the hidden states of two models, as an addition to a loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of layers in the list that the context returns, in order of the calls."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def hidden_distance(dense: Sequence[Tensor], compressed: Sequence[Tensor]) -> Tensor:
    """Return the relative L1 distance of hidden states at every position, shape [n_positions].

    For every position and layer, it is ``sum_j |c_j - d_j| / sum_j |d_j|``; the mean over layers is
    taken. The states of a few tokens are hundreds of times larger than others (massive
    activations). Relative to each state, they count no more than the rest.

    Parameters
    ----------
    dense, compressed : sequence of Tensor, shape [..., d_model]
        One for every layer.
    """
    distances = []
    for expected, found in zip(dense, compressed, strict=True):
        size = expected.float().abs().sum(-1)
        error = (found.float() - expected.float()).abs().sum(-1)
        distances.append((error / size.clamp_min(torch.finfo(size.dtype).tiny)).flatten())
    return torch.stack(distances).mean(0)
