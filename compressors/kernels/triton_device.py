"""Whether Triton can be used on a CUDA device."""

from functools import cache
from importlib import import_module

import torch

from lrc.compressors.kernels.cuda_device import gpu_problem
from lrc.compressors.kernels.failures import described


@cache
def triton_problem(device: int) -> str | None:
    """Return why Triton cannot be used on a CUDA device, with a remedy; None if a kernel succeeds.

    A GPU that is too old comes first: installing Triton would not help.
    """
    problem = gpu_problem(device)
    if problem is not None:
        return problem
    try:
        import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed; `pip install triton`"
        return _broken(error)
    except Exception as error:  # a library that does not fit raises nearly anything
        return _broken(error)
    try:
        correct = _interleaves(device)
    except Exception as error:
        return (
            f"Triton cannot compile or launch a kernel ({described(error)}); it needs a C compiler "
            "such as gcc, and the version that belongs to this torch: "
            "`pip install --force-reinstall torch triton`"
        )
    return None if correct else f"Triton computes wrong results on cuda:{device}; update it"


def _broken(error: Exception) -> str:
    return (
        f"Triton cannot be imported ({described(error)}); install the version that belongs to this "
        "torch: `pip install --force-reinstall torch triton`"
    )


def _interleaves(device: int) -> bool:
    """Run a small kernel and return whether its result is right."""
    from lrc.compressors.kernels import pivoted_triton

    with torch.cuda.device(device):  # Triton launches on the current device
        p = torch.arange(2.0, device=f"cuda:{device}")[None]
        order = torch.tensor([3, 0, 2, 1], device=p.device)
        y = pivoted_triton.interleave(p, p + 2, order)
    return torch.equal(y.cpu(), torch.tensor([[3.0, 0.0, 2.0, 1.0]]))
