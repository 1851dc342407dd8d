"""On which windows a step trains, and how fast."""

import math

import torch
from torch import Tensor

WARM_UP = 10
"""Steps over which the learning rate rises, or a tenth of all steps if these are fewer."""


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return the learning rate of a step, from 0: a linear rise, then a cosine that ends at zero.

    >>> [round(learning_rate(step, 40, 1.0), 2) for step in (0, 3, 4, 22, 39)]
    [0.25, 1.0, 1.0, 0.5, 0.0]
    """
    warm_up = max(1, min(WARM_UP, steps // 10))
    if step < warm_up:
        return highest * (step + 1) / warm_up
    return highest * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def batch_rows(step: int, *, n_windows: int, batch: int, seed: int) -> Tensor:
    """Return the indices of the windows [batch] that a step trains on.

    Every window is used once, in random order, before all are used again in a new order. The same
    arguments always give the same result: a resumed run trains on the windows that it would have
    trained on without the interruption.
    """
    rows: list[Tensor] = []
    for number in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(number, n_windows)
        if not rows or place == 0:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(n_windows, generator=generator)
        rows.append(order[place])
    return torch.stack(rows)
