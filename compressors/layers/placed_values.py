"""Stored values at the places of a mask, in training.

`torch.Tensor.masked_scatter` is enough to compute with a mask. Its gradient waits for the device to
count the entries, so that a training step cannot be recorded in a CUDA graph. With the places in
memory, the values and their gradient are gathered.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where values belong that are stored row by row without gaps."""

    sources: Tensor
    """[rows, columns], int32: which value an entry has; the number of values if it is zero."""
    targets: Tensor
    """[n_values], int32: the entry of each value, counted row by row."""


def places_of(mask: Tensor) -> Places:
    """Return the places of a mask [rows, columns]."""
    targets = mask.flatten().nonzero().flatten().int()
    sources = torch.full(mask.shape, len(targets), dtype=torch.int32, device=mask.device)
    sources[mask] = torch.arange(len(targets), dtype=torch.int32, device=mask.device)
    return Places(sources, targets)


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(targets)
        ctx.shape = values.shape
        rows = values.reshape(len(targets), -1)
        zero = rows.new_zeros(1, rows.shape[1])
        return torch.cat([rows, zero]).index_select(0, sources.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (targets,) = ctx.saved_tensors
        return gradients[0].index_select(0, targets).view(ctx.shape), None, None


def placed(values: Tensor, places: Places) -> Tensor:
    """Return values at their places, and zeros elsewhere.

    Parameters
    ----------
    values : Tensor
        With `n_values` numbers, or as many groups of numbers [n_values, size].
    places : Places
        Of a mask [rows, columns].

    Returns
    -------
    Tensor, shape [rows, columns * size]
    """
    found: Tensor = _Placed.apply(values, *places)  # type: ignore[no-untyped-call]
    return found.view(len(places.sources), -1)
