"""What forms are put together from, and the sentinel that stands where a dense weight stood."""

import torch
from torch import Tensor, nn

from lrc.compressors.layers.scheme import Leaves

Device = torch.device | str | None
SENTINEL: Leaves = {"weight": ([1], torch.uint8)}


def sentinel(like: Tensor) -> Tensor:
    """Return the content of the sentinel, on the device of `like`."""
    return torch.zeros(1, dtype=torch.uint8, device=like.device)


def empty_linear(
    d_in: int,
    d_out: int,
    *,
    bias: bool,
    device: Device,
    dtype: torch.dtype | None,
) -> nn.Linear:
    """Make a linear layer without spending time on initial values."""
    linear: nn.Linear = nn.utils.skip_init(
        nn.Linear, d_in, d_out, bias=bias, device=device or "cpu", dtype=dtype
    )
    return linear
