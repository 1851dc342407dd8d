"""What travels between decoder layers for every calibration window, and where it is kept.

One buffer for hidden states on their way up or gradients on their way down, rewritten in place
layer after layer. Now and then the chain is saved verbatim: recomputing it after a restart would
repeat hours of work, and a chain that is recomputed in another way is another chain. Beside it the
tape, which keeps the input of every layer until the gradients come by.
"""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from lrc.compressors.io.journal import Journal, publish, storage_errors

SNAPSHOT_SECONDS = 30.0
GIB = 2**30
GPU_SHARE = 0.25  # of the free memory: a layer, its moments and a batch need the rest
LIVE = ".live"
NAMES = ("states", "gradients", "tape", "dense", "prefix")
"""What a run may leave behind while it calibrates."""
Shape = tuple[int, int, int]


class Chain:
    """States or gradients [n_windows, length, d_model] in float32, `done` layers on their way.

    They stay on a GPU that has room for them, else in memory, else on disk.

    Parameters
    ----------
    name : str
        One of `NAMES`: snapshots and the file on disk are called so.
    limit_gib : float
        What is larger goes to disk.
    """

    def __init__(
        self, journal: Journal, name: str, shape: Shape, limit_gib: float, device: str
    ) -> None:
        self._journal, self._name = journal, name
        self._saved = time.monotonic()
        self.done = 0
        self.tensor = _reserve(journal, name, shape, torch.float32, limit_gib, device)

    def finish_layer(self, *, save: bool) -> None:
        """Note that one more layer is behind every window; save the chain when it is time."""
        self.done += 1
        if save and time.monotonic() - self._saved > SNAPSHOT_SECONDS:
            self.save()

    def save(self) -> None:
        """Save the chain, then drop the snapshot before it."""
        earlier = self._snapshots()
        partial = self._journal.path(f".{self._name}.partial")
        with storage_errors(partial), partial.open("wb") as file:
            file.write(self.tensor.cpu().numpy().data)  # tofile would not say which error it met
        publish(partial, self._journal.path(f"{self._name}-{self.done:04d}.f32"))
        for path in earlier:
            path.unlink()
        self._saved = time.monotonic()

    def resume(self) -> bool:
        """Load the newest snapshot; say whether there was one."""
        snapshots = self._snapshots()
        if not snapshots:
            return False
        newest = snapshots[-1]
        stored: Tensor = torch.from_file(str(newest), shared=False, size=self.tensor.numel())
        self.tensor.copy_(stored.view_as(self.tensor))
        self.done = int(newest.stem.removeprefix(f"{self._name}-"))
        return True

    def _snapshots(self) -> list[Path]:
        return sorted(self._journal.work.glob(f"{self._name}-*.f32"))


class Tape:
    """The input of every decoder layer, kept on the way up for the way down.

    In bfloat16 where the model itself computes in 16 bits: half the room, and the rounding is one
    that the model was trained with. It is never part of a snapshot; after a restart the way up is
    gone again.
    """

    def __init__(
        self,
        journal: Journal,
        n_layers: int,
        shape: Shape,
        dtype: torch.dtype,
        limit_gib: float,
        device: str,
    ) -> None:
        dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        layer = shape[0] * shape[1] * shape[2] * dtype.itemsize
        # Layers are read and written one at a time: a GPU with room for some of them holds those.
        near = min(n_layers, int(_room(device) // layer)) if layer else 0
        parts = [torch.empty((near, *shape), dtype=dtype, device=device)] if near else []
        if near < n_layers:
            far = ((n_layers - near) * shape[0], *shape[1:])
            kept = _reserve(journal, "tape", far, dtype, limit_gib, "cpu")
            parts.append(kept.view(n_layers - near, *shape))
        self._layers: list[Tensor] = [one for part in parts for one in part]

    def write(self, layer: int, states: Tensor) -> None:
        """Keep the input [n_windows, length, d_model] of a layer."""
        self._layers[layer].copy_(states)

    def read(self, layer: int, rows: slice, device: str) -> Tensor:
        """Return the input of a layer for some windows, in float32."""
        return self._layers[layer][rows].to(device, torch.float32)


def _room(device: str) -> float:
    """Return how many bytes of a GPU one of these buffers may take."""
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 0
    return GPU_SHARE * free


def _reserve(
    journal: Journal, name: str, shape: Shape, dtype: torch.dtype, limit_gib: float, device: str
) -> Tensor:
    """Find room: on a GPU that has it, else in memory up to the limit, else on disk."""
    size = shape[0] * shape[1] * shape[2]
    n_bytes = size * dtype.itemsize
    if n_bytes <= _room(device):
        return torch.empty(shape, dtype=dtype, device=device)
    if n_bytes <= limit_gib * GIB:
        return torch.empty(shape, dtype=dtype)
    path = journal.path(f"{name}{LIVE}")
    with storage_errors(path):
        with path.open("wb") as file:
            # Now: on a disk that fills up later, writing to the map kills the process.
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            else:
                file.truncate(n_bytes)
        flat: Tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    return flat.view(shape)


def state_files(journal: Journal) -> list[str]:
    """Return the journal's names of everything that calibration may have left behind."""
    snapshots = [path.name for name in NAMES for path in journal.work.glob(f"{name}-*.f32")]
    return [*(f"{n}{LIVE}" for n in NAMES), *(f".{n}.partial" for n in NAMES), *snapshots]
