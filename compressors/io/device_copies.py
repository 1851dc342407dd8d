"""Copies between host and GPU through pinned memory.

A GPU copies pinned memory five times as fast as pageable memory, without the host, which meanwhile
does something else. Between pinned memory, which PyTorch reuses, and other memory the host copies
with several threads.
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

PINNED_BYTES = 2**25
"""Bytes that are copied at once, or one row of a tensor if that is more."""
PIECES_ON_THE_WAY = 2
"""Pieces in pinned memory that a GPU writes while the host reads an earlier one."""


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU; from a GPU in pinned memory.

    Pageable memory fresh from the system is mapped page by page as it is first written, which can
    take ten times as long as the copy.
    """
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def to_device(
    tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a copy, on any device, of a tensor that is on the CPU.

    A copy even on the CPU: the pages of a mapped file that were touched stay in memory as long as
    the file is mapped.
    """
    if torch.device(device).type == "cpu":
        return tensor.to(device, dtype, copy=True)
    return on_device(tensor, device, dtype)


def on_device(
    tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a tensor on a device as `Tensor.to` does, converted there.

    Gradients do not go through it from a CPU to a GPU.
    """
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device, dtype)
    out = torch.empty_like(tensor, device=device)
    copy_(out, tensor)
    return out if dtype is None else out.to(dtype)


def copy_(target: Tensor, source: Tensor) -> None:
    """Copy values into a tensor on another device or the same one, as `Tensor.copy_` does.

    A GPU receives the pieces on its current stream. The host has received all of them when the
    function returns.
    """
    if source.is_cuda == target.is_cuda or not (source.ndim and source.numel()):
        target.copy_(source)
    elif target.is_cuda:
        for place, part in _pieces(target, source):
            # PyTorch reuses pinned memory when the copy from it has ended.
            pinned = torch.empty_like(part, pin_memory=True).copy_(part)
            place.copy_(pinned, non_blocking=True)
    else:
        _to_host_(target, source)


def _to_host_(target: Tensor, source: Tensor) -> None:
    stream = torch.cuda.current_stream(source.device)
    waiting: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()

    def finish() -> None:
        event, pinned, place = waiting.popleft()
        event.synchronize()
        place.copy_(pinned)

    for place, part in _pieces(target, source):
        pinned = torch.empty_like(place, pin_memory=True)
        pinned.copy_(part, non_blocking=True)  # the GPU converts
        waiting.append((stream.record_event(), pinned, place))
        if len(waiting) > PIECES_ON_THE_WAY:
            finish()
    while waiting:
        finish()


def _pieces(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield equal rows of two tensors of equal shape, as many as `PINNED_BYTES` of either."""
    row = max(each[:1].nbytes for each in (target, source))
    size = max(1, PINNED_BYTES // max(1, row))
    yield from zip(target.split(size), source.split(size), strict=True)
