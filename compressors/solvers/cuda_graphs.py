"""Recording of short sequences of CUDA kernels, which take longer to launch than to run."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)


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

    A recording that fails with a RuntimeError is repeated once, with all unused memory returned to
    the device. The second error is raised if that fails too, and is the one of the operation
    within `step`, if there is one.
    """
    if device.type != "cuda":
        step()
        return step
    stream = torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # also makes `device` the current one
        step()  # libraries allocate their workspaces on first use, which cannot be recorded
        stream.synchronize()
        graph = _captured(step, pool)
    current.wait_stream(stream)

    return _Recording(step, graph, device)


def record_if_possible(
    step: Callable[[], object], device: torch.device, pool: Any = None
) -> Callable[[], object]:
    """Run a function once as `record` does; return `step` itself if it cannot be recorded.

    That is so, for example, if its control flow depends on values.
    """
    runs = 0

    def counted() -> None:
        nonlocal runs
        step()
        runs += 1
        if runs == 1 and device.type == "cuda":  # the recording cannot use what it needed
            torch.cuda.empty_cache()

    try:
        return record(counted, device, pool)
    except Exception as error:
        if runs == 0:
            raise
        log.info("steps are not recorded: %s", error)
        torch.cuda.empty_cache()
        return step


def is_recording() -> bool:
    """Return whether the current stream is recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _captured(step: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """Record a function on the current stream, again if it fails the first time."""
    try:
        return _capture(step, pool)
    except RuntimeError as error:
        log.info("a recording has failed and is repeated: %s", error)
    # After the handler, so that the error no longer refers to tensors of the step. If memory is
    # short, the allocator frees some in order to get more, which ends a recording.
    gc.collect()
    with suppress(RuntimeError):  # torch before 2.12 still counts the recording that failed
        torch.cuda.empty_cache()
    return _capture(step, pool)


def _capture(step: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """Record a function on the current stream."""
    graph = torch.cuda.CUDAGraph()
    with _no_garbage_collection():
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with suppress(RuntimeError):  # which would hide the reason
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from freeing earlier recordings in the meantime.

    That is not permitted while a stream is recorded: torch only prints a warning, and the next
    operation fails, such as a product with CUBLAS_STATUS_EXECUTION_FAILED.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _Recording:
    step: Callable[[], object]
    graph: torch.cuda.CUDAGraph
    device: torch.device

    def __call__(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()
