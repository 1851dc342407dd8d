"""The product of one row of inputs and a matrix of 16-bit numbers on a CUDA device.

Generating a token multiplies one row. The kernel reads the matrix about a tenth faster than cuBLAS
does; with more rows, cuBLAS is faster.
"""

import torch
from torch import Tensor, nn

from lrc.compressors.kernels.fast_path import needs_gradients
from lrc.compressors.kernels.implementations import MODULES
from lrc.compressors.kernels.triton_device import triton_problem

_usable: dict[int, bool] = {}
"""Whether a device runs the kernel, by its index. Not a cached function, because compiled code
reads this."""


def prepare(device: torch.device) -> None:
    """Find out whether a device runs the kernel; until then it is not used."""
    index = device.index or 0
    if device.type == "cuda" and index not in _usable:
        _usable[index] = "pivoted" in MODULES and triton_problem(index) is None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` for ``x`` [..., d_in] and `weight` [d_out, d_in]."""
    if not _serves(x, weight):
        return nn.functional.linear(x, weight)
    product = one_row_op if torch.compiler.is_compiling() else _one_row
    y: Tensor = product(x.reshape(1, -1), weight)
    return y.view(*x.shape[:-1], len(weight))


def _serves(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.is_cuda
        and x.numel() == x.shape[-1] == weight.shape[1]
        and x.device == weight.device
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and _usable.get(weight.get_device(), False)
        and weight.is_contiguous()
        and not needs_gradients(x, weight)
        and not torch.is_autocast_enabled("cuda")
    )


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    from lrc.compressors.kernels import pivoted_triton

    with torch.cuda.device(x.device):
        y: Tensor = pivoted_triton.few_rows(x.contiguous(), weight, None)
    return y


one_row_op = torch.library.custom_op("lrc::one_row_linear", _one_row, mutates_args=())


@one_row_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
