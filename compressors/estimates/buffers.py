"""Where the hidden states and gradients of all windows are kept: on the GPU, the host or the disk.

This follows the rules of `lrc.compressors.calibrate.activation_cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lrc.compressors.calibrate.calibration_context import GPU_FRACTION


@dataclass
class Buffers:
    """Bytes of the buffers of one stage, by place."""

    free_gpu: int
    """Free memory of the GPU before the stage; 0 on a CPU."""
    limit: int
    """Largest buffer that is kept on the host."""
    gpu: int = 0
    host: int = 0
    disk: int = 0

    def add(self, size: int) -> None:
        """Place a buffer."""
        if size <= GPU_FRACTION * (self.free_gpu - self.gpu):
            self.gpu += size
        elif size <= self.limit:
            self.host += size
        else:
            self.disk += size

    def add_checkpoints(self, sizes: Sequence[int]) -> None:
        """Place the inputs of the layers, of which the GPU may hold only some."""
        room, on_gpu = GPU_FRACTION * (self.free_gpu - self.gpu), 0
        while on_gpu < len(sizes) and sum(sizes[: on_gpu + 1]) <= room:
            on_gpu += 1
        self.gpu += sum(sizes[:on_gpu])
        rest = sum(sizes[on_gpu:])
        if rest <= self.limit:
            self.host += rest
        else:
            self.disk += rest
