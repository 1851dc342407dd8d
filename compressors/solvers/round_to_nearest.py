"""Rounding to nearest: every number for itself."""

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.solvers.quantization_grid import find_grid, round_to
from lrc.compressors.solvers.quantized_matrix import Rounded


def rtn(W: Tensor, scheme: Scheme, *, dtype: torch.dtype, H: Tensor | None = None) -> Rounded:
    """Round a matrix to nearest, on the grid that loses least.

    Parameters
    ----------
    W : Tensor, shape [rows, columns]
    scheme : Scheme
    dtype : torch.dtype
        Of the scales in the file.
    H : Tensor, shape [columns, columns], optional
        Second moment of the inputs; its diagonal weighs the errors that the grid is chosen by.

    Raises
    ------
    ValueError
        What `find_grid` says.
    """
    grid = find_grid(W, scheme, dtype=dtype, weights=None if H is None else H.diagonal())
    return Rounded(round_to(W, grid, scheme), grid.scale, grid.zero, scheme)
