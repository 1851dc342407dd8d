"""Whether a CUDA device can run the kernels."""

from functools import cache

import torch

from lrc.compressors.kernels import nvrtc
from lrc.compressors.kernels.failures import described

OLDEST = (8, 0)
"""Compute capability of the first devices with bfloat16."""


def gpu_problem(device: int) -> str | None:
    """Return why no kernel can run on a device; None if one may."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for AMD"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(device), found
        return (
            f"cuda:{device} ({name}) has compute capability {major}.{minor}, and the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]}; use a newer GPU"
        )
    return None


@cache
def cuda_problem(device: int) -> str | None:
    """Return why NVRTC cannot be used on a device, with a remedy; None if a kernel succeeds."""
    problem = gpu_problem(device)
    if problem is not None:
        return problem
    try:
        correct = nvrtc.probe(device)
    except Exception as error:
        return (
            f"PyTorch's NVRTC cannot compile or launch a kernel ({described(error)}); install a "
            "torch for the CUDA version of the driver, see https://pytorch.org/get-started"
        )
    return None if correct else f"kernels compute wrong results on cuda:{device}; update the driver"
