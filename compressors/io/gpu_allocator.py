"""How torch reserves memory of a GPU."""

import os
import sys

ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
"""Environment variables that torch reads."""


def use_expandable_segments() -> None:
    """Let torch join freed pieces of GPU memory, unless the user has set its allocator.

    Stages need a few large tensors of different sizes. In fixed segments, a search that needs 9 GiB
    can fail with 12, of which a third is free in pieces. This must precede the first tensor on a
    GPU.
    """
    if sys.platform == "linux" and not os.environ.keys() & ALLOCATOR_SETTINGS:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
