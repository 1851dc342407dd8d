"""Whether Triton can be used on a CUDA device."""

from functools import cache
from importlib.util import find_spec

import torch

OLDEST = (8, 0)
"""Compute capability of the first devices with bfloat16."""


@cache
def triton_problem(device: int) -> str | None:
    """Return why Triton cannot be used on a CUDA device; None if a small kernel succeeds."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}"
    p = torch.arange(2.0, device=f"cuda:{device}")[None]
    try:
        from lrc.compressors.kernels import pivoted_triton

        with torch.cuda.device(device):  # Triton launches on the current device
            y = pivoted_triton.interleave(p, p + 2, torch.tensor([3, 0, 2, 1], device=p.device))
    except Exception as error:  # Triton needs a C compiler at run time, among others
        return f"Triton fails: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return None if y.tolist() == [[3.0, 0.0, 2.0, 1.0]] else "Triton computes wrong results"
