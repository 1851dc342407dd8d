"""Give freed memory back to the system between stages."""

import ctypes
import gc
import sys

import torch


def release_memory() -> None:
    """Collect garbage and return free pages.

    glibc keeps freed blocks for later; after a stage that held a whole model in pieces that is
    hundreds of megabytes that the next stage would be blamed for.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
