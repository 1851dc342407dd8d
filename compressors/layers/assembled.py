"""When training multiplies by the matrix that two factors make, instead of one after the other.

The products with factors need fewer operations, but write and read their intermediate results for
every token, and ranks that are no multiples of eight exclude the fastest matrix products. With
small matrices that costs more than the operations that it saves. The whole matrix is kept for the
gradients.
"""

import torch
from torch import Tensor, nn

from lrc.compressors.kernels import needs_gradients
from lrc.compressors.layers.component import is_plain

LARGEST_SIDE = 2048
"""Of the smaller side of a matrix that is assembled. Larger ones are multiplied by their factors:
there, the operations that these save take longer than reading and writing what is computed."""


def is_assembled(x: Tensor, first: nn.Module, second: nn.Module, shape: tuple[int, int]) -> bool:
    """Return whether a product for training uses the whole matrix.

    Parameters
    ----------
    x : Tensor, shape [..., d_in]
    first, second : nn.Module
        The linear layers of the factors.
    shape : tuple of int
        ``(d_out, d_in)`` of the matrix.
    """
    return (
        x.is_cuda
        and min(shape) <= LARGEST_SIDE
        and x.numel() // shape[1] >= max(shape)
        and all(is_plain(each) and type(each) is nn.Linear for each in (first, second))
        and needs_gradients(*first.parameters(), *second.parameters())
        and not torch.compiler.is_compiling()
    )
