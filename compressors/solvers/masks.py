"""Boolean masks: selection of entries by score, in any place or two of every four."""

from typing import Literal

import torch
from torch import Tensor

Pattern = Literal["unstructured", "2:4"]


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the shape of `scores`, True for exactly the `count` largest."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return mask.index_fill_(0, scores.flatten().topk(count).indices, True).view(scores.shape)


def two_of_four(scores: Tensor, dim: int) -> Tensor:
    """Return a mask of the two largest of every four consecutive scores along a dimension >= 0.

    The size along `dim` is a multiple of 4. Of equal scores the earlier one is selected.
    """
    fours = scores.unflatten(dim, (-1, 4)).unbind(dim + 1)
    ranks = [torch.zeros_like(four, dtype=torch.int8) for four in fours]
    for i in range(4):
        for j in range(i):
            later = fours[i] > fours[j]
            ranks[j] += later
            ranks[i] += ~later
    return torch.stack([rank < 2 for rank in ranks], dim=dim + 1).reshape(scores.shape)


def drop_and_swap(mask: Tensor, losses: Tensor, gains: Tensor, *, drop: int, swaps: int) -> Tensor:
    """Remove entries from a mask, then exchange kept for removed ones where this pays.

    Parameters
    ----------
    mask : Tensor, bool
        True where an entry is kept.
    losses, gains : Tensor, of the shape of `mask`
        Cost of removing each kept entry, and benefit of keeping each removed one.
    drop : int
        Number of entries to remove, those of smallest loss.
    swaps : int
        Maximum number of exchanges. The next smallest losses are paired with the largest gains, and
        a pair is exchanged if the gain exceeds the loss.
    """
    out, outgoing = torch.where(mask, losses, torch.inf).flatten().topk(drop + swaps, largest=False)
    come, incoming = torch.where(mask, -torch.inf, gains).flatten().topk(swaps)
    pays = come > out[drop:]
    flat = mask.flatten().clone()
    flat[outgoing[:drop]] = False
    flat[outgoing[drop:]] &= ~pays
    flat[incoming] |= pays
    return flat.view(mask.shape)
