"""Recording of short sequences of CUDA kernels, which take longer to launch than to run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def record(
    step: Callable[[], object], device: torch.device, pool: Any = None
) -> Callable[[], object]:
    """Run a function once, and return a function that repeats it: `step` itself without CUDA.

    It reads and writes tensors on `device` in place. Neither shapes nor control flow may depend on
    their values, and it must not wait for the device. Kernels are recorded for `device` even if
    another one is current, and repeated on its current stream. The returned function keeps `step`,
    and with it the tensors that `step` refers to, whose addresses are part of the recording.
    Recordings with the same `pool`, see `torch.cuda.graph_pool_handle`, share the memory of their
    intermediate results.
    """
    if device.type != "cuda":
        step()
        return step
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # also makes `device` the current one
        step()  # libraries allocate their workspaces on first use, which cannot be recorded
        stream.synchronize()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    current.wait_stream(stream)

    return _Recording(step, graph, device)


@dataclass(frozen=True)
class _Recording:
    step: Callable[[], object]
    graph: torch.cuda.CUDAGraph
    device: torch.device

    def __call__(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()
