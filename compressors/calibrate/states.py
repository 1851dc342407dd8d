"""The hidden states of every calibration window between two decoder layers.

One buffer, rewritten in place layer after layer; on disk when it is larger than the recipe's
limit. Now and then the chain is saved verbatim: recomputing it after a restart would repeat hours
of work, and a chain that is recomputed in another way is another chain.
"""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from lrc.compressors.journal import Journal, publish, storage_errors

SNAPSHOT_SECONDS = 30.0
GIB = 2**30
GPU_SHARE = 0.2  # of the free memory: a layer, its moments and a batch need the rest
LIVE, PARTIAL = "states.live", ".states.partial"


class HiddenStates:
    """Hidden states [n_windows, length, d_model] in float32, before layer `next_layer`.

    They stay on a GPU that has room for them, else in memory, else on disk.
    """

    def __init__(
        self, journal: Journal, shape: tuple[int, int, int], limit_gib: float, device: str
    ) -> None:
        self._journal = journal
        self._saved = time.monotonic()
        self.next_layer = 0
        n_bytes = shape[0] * shape[1] * shape[2] * 4
        if device.startswith("cuda") and n_bytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.tensor = torch.empty(shape, device=device)
        elif n_bytes <= limit_gib * GIB:
            self.tensor = torch.empty(shape)
        else:
            path = journal.path(LIVE)
            with storage_errors(path):
                _reserve(path, n_bytes)
                flat = torch.from_file(str(path), shared=True, size=n_bytes // 4)
            self.tensor = flat.view(shape)

    def finish_layer(self, layer: int, *, last: bool) -> None:
        """Note that `layer` has been applied to every window; save the chain when it is time."""
        self.next_layer = layer + 1
        if not last and time.monotonic() - self._saved > SNAPSHOT_SECONDS:
            self.save()

    def save(self) -> None:
        """Save the chain, then drop the snapshot before it."""
        earlier = self._snapshots()
        partial = self._journal.path(PARTIAL)
        with storage_errors(partial), partial.open("wb") as file:
            file.write(self.tensor.cpu().numpy().data)  # tofile would not say which error it met
        publish(partial, self._journal.path(f"states-{self.next_layer:04d}.f32"))
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
        self.next_layer = int(newest.stem.removeprefix("states-"))
        return True

    def _snapshots(self) -> list[Path]:
        return sorted(self._journal.work.glob("states-*.f32"))


def _reserve(path: Path, n_bytes: int) -> None:
    """Take the space now: on a disk that fills up later, writing to the map kills the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, n_bytes)


def state_files(journal: Journal) -> list[str]:
    """Return the journal's names of everything that hidden states may have left behind."""
    return [LIVE, PARTIAL, *(path.name for path in journal.work.glob("states-*.f32"))]
