"""Apply functions of single tokens to a few thousand tokens at a time."""

from collections.abc import Callable

import torch
from torch import Tensor


def is_certain(condition: bool) -> bool:
    """Return whether a condition on sizes holds; False if it depends on a size left open."""
    if not torch.compiler.is_compiling():
        return condition
    # Imported here because it takes a second; whoever compiles has done so.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def exceeds(x: Tensor, tile: int | None) -> bool:
    """Return whether ``x`` [..., d] is to be cut: more tokens than a tile, and no gradients.

    Gradients need the activations anyway. Code compiled for any number of tokens is not cut.
    """
    if tile is None or torch.is_grad_enabled():
        return False
    return is_certain(x.numel() > tile * x.shape[-1])


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """Return ``function(x)`` [..., d_out] of ``x`` [..., d_in], computed tile by tile.

    Tiles have equally many tokens, but for the last one, and at most `tile`.
    """
    rows = x.reshape(-1, x.shape[-1])  # [n, d_in]
    n = len(rows)
    count = -(-n // tile)
    size = -(-n // count)
    first = function(rows[:size])  # [size, d_out]
    y = first.new_empty(n, first.shape[-1])
    y[:size] = first
    del first
    for start in range(size, n, size):
        y[start : start + size] = function(rows[start : start + size])
    return y.view(*x.shape[:-1], -1)
