"""Quantization with removal of the blocks of numbers that matter least."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.block_search import masked, select_blocks
from lrc.compressors.solvers.column_quantizer import ZERO_SCALE
from lrc.compressors.solvers.coordinate_descent import coordinate_descent
from lrc.compressors.solvers.gptq import DAMP, check_metric, factor_inverse_hessian, propagate_error
from lrc.compressors.solvers.linalg import check_size
from lrc.compressors.solvers.masks import largest
from lrc.compressors.solvers.quantization_grid import check_finite, find_grid
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix, better_rows, round_to_nearest


@dataclass(frozen=True)
class QuantizedBlocks:
    """The kept blocks of a weight as integers, each with one scale."""

    codes: Tensor
    """[blocks, width], int8, row after row."""
    scale: Tensor
    """[blocks], at the precision of the file."""
    mask: Tensor
    """[rows, blocks per row], True where a block is kept."""
    scheme: QuantizationArgs
    fallback: str | None = None

    def weight(self) -> Tensor:
        """Return the dequantized matrix [rows, columns] in float64."""
        numbers = self.codes * self.scale.double()[:, None]
        whole = numbers.new_zeros(*self.mask.shape, numbers.shape[1])
        return whole.masked_scatter(self.mask[:, :, None], numbers).flatten(1)


def quantize_blocks(
    W: Tensor,
    H: Tensor | None,
    n_blocks: int,
    scheme: QuantizationArgs,
    *,
    dtype: torch.dtype,
    damp: float = DAMP,
    act_order: bool = True,
) -> QuantizedBlocks:
    """Keep some blocks of a matrix, and quantize them, to minimize ``tr((W - W_q) H (W - W_q)^T)``.

    A block is a group of numbers that share a scale. The blocks that cost least are removed, over
    the whole matrix; the others are refitted, quantized column by column as in GPTQ, and improved
    by coordinate descent. No row has a larger error than its refitted blocks rounded to nearest.

    Parameters
    ----------
    W : Tensor, shape [rows, columns]
    H : Tensor, shape [columns, columns], or None
        Second moment of the inputs. If it is unknown or zero, the blocks of largest norm are kept
        and rounded to nearest.
    n_blocks : int
        Number of blocks to keep, in ``[1, rows * columns / group_size]``.
    scheme : QuantizationArgs
        Symmetric, with a group size.
    dtype, damp, act_order
        As for `gptq`.

    Raises
    ------
    ValueError
        If `n_blocks` is out of range, if `H` does not fit `W`, and see `find_grid`.

    Notes
    -----
    The representation is that of GQSA (https://arxiv.org/abs/2412.17560). Blocks are ranked by the
    exact increase of the error when one is removed and all others compensate, as in optimal brain
    surgeon for single weights, followed by swaps. The paper's first stage, which trains the weights
    by gradients, is replaced by a closed-form refit and GPTQ; its second stage, end-to-end training
    of the scales, is not implemented.
    """
    check_finite(W, "the matrix")
    rows, columns = W.shape
    per_row = scheme.groups(columns)
    check_size("n_blocks", n_blocks, rows * per_row, W.shape)
    W = W.double()
    if H is not None:
        check_metric(W, H)
    if H is None or not H.diagonal().any():
        why = "saw no calibration token" if H is None else "inputs were all zero"
        mask = largest(W.view(rows, per_row, -1).square().sum(dim=2), n_blocks)
        nearest = round_to_nearest(masked(W, mask), scheme, dtype=dtype)
        return _kept(nearest, mask, f"{why}: groups kept by norm, rounded to nearest")
    H = H.double()
    W_hat, mask = select_blocks(W, H, n_blocks, per_row, damp=damp)
    nearest = round_to_nearest(W_hat, scheme, dtype=dtype, H=H)
    inverse = factor_inverse_hessian(H, damp, act_order=act_order)
    grid = find_grid(W_hat, scheme, dtype=dtype, weights=inverse.weights)
    zero_scale = min(ZERO_SCALE, torch.finfo(dtype).max)
    grid = replace(grid, scale=torch.where(mask, grid.scale, zero_scale))
    codes = propagate_error(W_hat, inverse, *grid.expand(columns), scheme)
    start = QuantizedMatrix(codes, grid.scale, None, scheme)
    found = better_rows(W, H, coordinate_descent(W, H, start, damp=damp), nearest)
    return _kept(found, mask, inverse.fallback)


def _kept(matrix: QuantizedMatrix, mask: Tensor, fallback: str | None) -> QuantizedBlocks:
    """Extract the kept blocks of a matrix."""
    codes = matrix.codes.view(*mask.shape, -1)[mask]
    return QuantizedBlocks(codes, matrix.scale[mask], mask, matrix.scheme, fallback)
