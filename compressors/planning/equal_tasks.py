"""Batches of equal tasks, which are solved at the same time."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


def split_batches(
    items: Iterable[T],
    kind: Callable[[T], Hashable | None],
    size: Callable[[T], int],
    limit: int,
) -> list[list[T]]:
    """Split items into batches of one kind, in the order of the first item of each batch.

    Parameters
    ----------
    kind : callable
        Of an item; None for one that is a batch alone.
    size : callable
        Of an item, in the unit of `limit`. All items of a kind have one size.
    limit : int
        Largest size of a batch of several items.
    """
    found: list[list[T]] = []
    growing: dict[Hashable, list[T]] = {}
    for item in items:
        key = kind(item)
        batch = None if key is None else growing.get(key)
        if batch is None or (len(batch) + 1) * size(item) > limit:
            batch = []
            found.append(batch)
            if key is not None:
                growing[key] = batch
        batch.append(item)
    return found
