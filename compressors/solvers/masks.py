"""Boolean masks: selection of entries by score, in any place or equally many of every group."""

from typing import Literal

import torch
from torch import Tensor

Pattern = Literal["unstructured", "2:4", "n:8"]
GROUP_SIZES: dict[Pattern, int] = {"2:4": 4, "n:8": 8}
"""Number of consecutive entries of a row of which equally many are kept."""


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the shape of `scores`, True for exactly the `count` largest."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return mask.index_fill_(0, scores.flatten().topk(count).indices, True).view(scores.shape)


def largest_of_groups(scores: Tensor, count: int, size: int, dim: int) -> Tensor:
    """Return a mask of the `count` largest of every `size` consecutive scores along `dim` >= 0.

    The size along `dim` is a multiple of `size`. Of equal scores the earlier one is selected.
    """
    members = scores.unflatten(dim, (-1, size)).unbind(dim + 1)
    ranks = [torch.zeros_like(member, dtype=torch.int8) for member in members]
    for i in range(size):
        for j in range(i):
            later = members[i] > members[j]
            ranks[j] += later
            ranks[i] += ~later
    return torch.stack([rank < count for rank in ranks], dim=dim + 1).reshape(scores.shape)


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


def swap_in_groups(mask: Tensor, losses: Tensor, gains: Tensor, *, size: int, swaps: int) -> Tensor:
    """Exchange a kept for a removed entry in the groups of a row where this pays most.

    Groups have `size` consecutive entries. In each, the smallest loss is paired with the largest
    gain, so that at most one pair is exchanged: two exchanges in one group would each be chosen as
    if the other were not made. Parameters are those of `drop_and_swap`.
    """
    out, outgoing = torch.where(mask, losses, torch.inf).reshape(-1, size).min(dim=1)  # [groups]
    come, incoming = torch.where(mask, -torch.inf, gains).reshape(-1, size).max(dim=1)
    chosen = largest(come - out, min(swaps, len(out))) & (come > out)
    places = torch.arange(size, device=mask.device)
    pair = (places == outgoing[:, None]) | (places == incoming[:, None])  # [groups, size]
    return mask ^ (pair & chosen[:, None]).view(mask.shape)
