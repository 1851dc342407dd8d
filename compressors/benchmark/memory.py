"""Memory in use, its peak, and whether several models fit."""

import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.reader import Contents
from lrc.compressors.io.machine import free_memory, release_memory

SAMPLING_SECONDS = 0.002
"""Between two readings of the process memory; a shorter peak may be missed."""
HEADROOM = 1.25
"""Memory that models need to run, caches and activations included, over that of their weights."""


@dataclass
class Peak:
    """Largest use of memory in a context."""

    grown: int = 0
    """Bytes above what was in use at its start; known after its end."""


class Meter:
    """Memory of a device in bytes: what torch has allocated on a GPU, or the resident set.

    On a CPU it is sampled by a thread. Pages of files that are mapped into memory count.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._process = psutil.Process()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self._device.startswith("cuda")

    def used(self) -> int:
        """Return the bytes in use by this process."""
        if self.on_gpu:
            return torch.cuda.memory_allocated(self._device)
        return int(self._process.memory_info().rss)

    def available(self) -> int:
        """Return the bytes that can still be allocated."""
        return free_memory(self._device)

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Measure the peak inside the context."""
        release_memory()  # otherwise blocks that were freed before are used without growing
        found, before = Peak(), self.used()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            try:
                yield found
            finally:
                found.grown = torch.cuda.max_memory_allocated(self._device) - before
            return
        largest, stop = [before], threading.Event()

        def sample() -> None:
            while not stop.wait(SAMPLING_SECONDS):
                largest[0] = max(largest[0], self.used())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()
            found.grown = max(largest[0], self.used()) - before


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model; those of shared storage once."""
    tensors: Iterable[Tensor] = chain(model.parameters(), model.buffers())
    storages = [tensor.untyped_storage() for tensor in tensors]
    total: int = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    return total


def read_pages(model: nn.Module) -> None:
    """Read a byte of every page of the weights on a CPU.

    They may be files mapped into memory, of which nothing is read before it is used.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        stored = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
        stored[:: mmap.PAGESIZE].sum()


def estimate_bytes(contents: Contents, dtype: torch.dtype) -> int:
    """Estimate the bytes of the weights of a checkpoint, loaded in `dtype`, from its headers.

    Integers stay as they are stored, except in plain checkpoints, which transformers expands.
    """
    expanded: Any = () if contents.needs_lrc else contents.modules.values()
    replaced = contents.stored_tensors() if expanded else {}
    numbers: int = sum(prod(config.shape) for config in expanded)
    others = 0
    for name, header in contents.headers.items():
        if name in replaced:
            continue
        if header.is_number:
            numbers += prod(header.shape)
        else:
            others += header.nbytes
    return numbers * dtype.itemsize + others


def fit_together(weights: Sequence[int], available: int) -> bool:
    """Return whether models with these bytes of weights can be loaded at the same time.

    >>> fit_together([100, 60], available=201), fit_together([100, 60], available=199)
    (True, False)
    """
    return sum(weights) * HEADROOM <= available
