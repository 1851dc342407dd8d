"""Memory that products on the CPU use again for every layer."""

import threading
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor that is valid until the next call with this name.

    Memory of a megabyte goes back to the system when it is freed, and the page faults of getting
    it again take several times as long as what it is used for. Every thread has its own.
    """
    buffers: dict[Any, Tensor] = _local.__dict__
    size, found = prod(shape), buffers.get((name, dtype))
    if found is None or found.numel() < size:
        # An inference tensor could not be written to outside of inference mode.
        with torch.inference_mode(False):
            found = torch.empty(size, dtype=dtype)
        buffers[name, dtype] = found
    return found[:size].view(*shape)
