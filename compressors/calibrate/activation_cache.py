"""Buffers for what passes between decoder layers, for every window.

An activation cache holds the current layer's hidden states (forward pass) or gradients (backward
pass) and is overwritten layer by layer. It is saved from time to time: repeating hours of work
after a restart would be slow, and would change the last digits. Activation checkpoints keep the
input of every layer, from which the backward pass recomputes the layer.
"""

import os
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.io.device_copies import copy_
from lrc.compressors.io.files import publish, storage_errors
from lrc.compressors.io.freed_memory import drop_shared_pages
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import free_memory
from lrc.configs.size import GIB

SNAPSHOT_SECONDS = 30.0
LIVE = ".live"
NAMES = (
    *("states", "gradients", "checkpoints", "dense", "compressed", "evaluation"),
    *("changed", "final"),
)
"""Buffers that an interrupted run may leave on disk."""
Shape = tuple[int, int, int]


class ActivationCache:
    """Hidden states or gradients [n_windows, length, d_model] in float32, after `done` layers.

    Of the windows of this process; `first` is the number of windows of the processes before it.
    Kept on the GPU if there is room, else in memory up to the limit, else on disk. The name, one of
    `NAMES`, is that of the snapshots and of the file on disk.
    """

    def __init__(
        self, context: CalibrationContext, name: str, shape: Shape, first: int = 0
    ) -> None:
        self._journal, self._name = context.journal, name
        self._alone, self._first = context.processes.alone, first
        self._saved = time.monotonic()
        self.done = 0
        self.tensor = _allocate(context, name, shape, torch.float32, context.device)

    def finish_layer(self, *, save: bool, before: Callable[[], None] = lambda: None) -> None:
        """Count one more finished layer; if `save`, write a snapshot when one is due.

        Several processes write none: they are not at the same layer. `before` waits until the
        results of all layers so far are on disk: a run that continues does not go through them.
        """
        self.done += 1
        if save and self._alone and time.monotonic() - self._saved > SNAPSHOT_SECONDS:
            before()
            self.save()

    def save(self) -> None:
        """Write a snapshot, then delete the previous one."""
        previous = self._snapshots()
        partial = self._journal.path(f".{self._name}.partial")
        with storage_errors(partial), partial.open("wb") as file:
            for window in self.tensor:
                file.write(window.cpu().numpy().data)  # tofile would hide the errno
                drop_shared_pages(window)
        publish(partial, self._journal.path(f"{self._name}-{self.done:04d}.f32"))
        for path in previous:
            path.unlink()
        self._saved = time.monotonic()

    def resume(self) -> bool:
        """Load the newest snapshot; return whether there was one."""
        snapshots = self._snapshots()
        if not snapshots:
            return False
        offset = self._first * prod(self.tensor.shape[1:])
        size = offset + self.tensor.numel()
        stored: Tensor = torch.from_file(str(snapshots[-1]), shared=False, size=size)
        copy_(self.tensor, stored[offset:].view_as(self.tensor))
        self.done = int(snapshots[-1].stem.removeprefix(f"{self._name}-"))
        return True

    def _snapshots(self) -> list[Path]:
        return sorted(self._journal.work.glob(f"{self._name}-*.f32"))


def copy_states(target: Tensor, source: Tensor) -> None:
    """Copy states [n_windows, length, d_model], one window in memory at a time."""
    for new, old in zip(target, source, strict=True):
        copy_(new, old)
        drop_shared_pages(new)
        drop_shared_pages(old)


def allocate_checkpoints(context: CalibrationContext, n_layers: int, shape: Shape) -> list[Tensor]:
    """Allocate buffers for the inputs of decoder layers, which the backward pass recomputes from.

    In bfloat16 where the model computes in 16 bits: half the memory, and a precision that the
    model was trained in. Not part of any snapshot; after a restart the forward pass is repeated.
    """
    device = context.device
    stored = next(iter(context.architecture.stored_parameters().values())).dtype
    dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
    # Layers are read and written one at a time, so the GPU may hold only some of them.
    on_device = min(n_layers, int(_device_room(context, device) // (prod(shape) * dtype.itemsize)))
    layers = [*torch.empty((on_device, *shape), dtype=dtype, device=device)]
    if on_device < n_layers:
        rest = ((n_layers - on_device) * shape[0], *shape[1:])
        layers += [*_allocate(context, "checkpoints", rest, dtype, "cpu").view(-1, *shape)]
    return layers


def _device_room(context: CalibrationContext, device: str) -> float:
    """Return how many bytes of a GPU one of these buffers may use."""
    return context.gpu_fraction * free_memory(device) if device.startswith("cuda") else 0


def _allocate(
    context: CalibrationContext, name: str, shape: Shape, dtype: torch.dtype, device: str
) -> Tensor:
    """Allocate on the GPU if it has room, else in memory up to the limit, else on disk."""
    n_bytes = prod(shape) * dtype.itemsize
    if n_bytes <= _device_room(context, device):
        return torch.empty(shape, dtype=dtype, device=device)
    if n_bytes <= context.memory_limit_gib * GIB:
        return torch.empty(shape, dtype=dtype)
    path = context.journal.path(live_file(name, context.processes.rank))
    with storage_errors(path):
        with path.open("wb") as file:
            # Reserve the space now: if the disk fills up later, writing to the map kills us.
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            else:
                file.truncate(n_bytes)
        flat: Tensor = torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype)
    return flat.view(shape)


def live_file(name: str, rank: int = 0) -> str:
    """Return the journal's name for the file of a buffer that does not fit into memory."""
    return f"{name}-{rank}{LIVE}" if rank else f"{name}{LIVE}"


def cache_files(journal: Journal) -> list[str]:
    """Return the journal's names of all buffers and snapshots that calibration may have left."""
    found = [path.name for n in NAMES for path in journal.work.glob(f"{n}-*.f32")]
    found += [path.name for n in NAMES for path in journal.work.glob(f"{n}*{LIVE}")]
    return [*(f".{n}.partial" for n in NAMES), *found]
