"""Threads of operations that are too short to be divided between several."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let operations on a CPU use one thread in the context.

    PyTorch divides some operations of a few microseconds, such as rounding 10,000 numbers. Threads
    that wait for each other then take 30 times as long if other processes use the cores, too.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_in_threads(work: Callable[[A], B], parts: Iterable[A], device: torch.device) -> list[B]:
    """Return ``work(part)`` of all parts, in order; on a CPU, of several at the same time.

    Each part is one thread's, which waits for no other. Parts must not depend on each other.
    """
    threads, work = torch.get_num_threads(), torch.no_grad()(work)  # threads start with gradients
    if device.type != "cpu" or threads == 1:
        return [work(part) for part in parts]
    with one_thread(device), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))
