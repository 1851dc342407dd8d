"""Memory of the host: what leaves the GPU, and what is given back to the system."""

import ctypes
import gc
import sys

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU; from a GPU by way of page-locked memory, which PyTorch reuses.

    Memory fresh from the system is handed out page by page as it is first written, which can take
    ten times as long as the copy.
    """
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def release_memory() -> None:
    """Collect garbage and return free pages.

    glibc keeps freed blocks for later; after a stage that held a whole model in pieces that is
    hundreds of megabytes that the next stage would be blamed for.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()  # from torch 2.12 on
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
