"""Coordinate descent on the codes and scales of a quantized matrix."""

from dataclasses import replace

import torch
from torch import Tensor

from lrc.compressors.solvers.column_quantizer import ColumnQuantizer
from lrc.compressors.solvers.linalg import add_product_, damped
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix

PASSES = 3  # after GPTQ


def coordinate_descent(
    W: Tensor, H: Tensor, start: QuantizedMatrix, *, damp: float, passes: int = PASSES
) -> QuantizedMatrix:
    """Lower ``tr((W - W_q) H (W - W_q)^T)`` by changing one scale or one column at a time.

    For every group of columns, a pass first sets the scale of each row to the best one for its
    codes, rounded to the dtype of the file and only if that lowers the error, and then every column
    of the group to the best codes while all others are fixed. The updates of the columns are those
    of QuantEase, https://arxiv.org/abs/2309.01885.

    `W` [..., rows, columns] and `H` [..., columns, columns], one or a stack of them, are in
    float64; `damp` times the mean diagonal of
    H is added to its diagonal. With the damping of GPTQ the error on held-out text is 1 to 2 %
    lower than with almost none, on SmolLM2-135M.
    """
    quantizer = ColumnQuantizer(start.scheme, W.device)
    dtype = quantizer.dtype
    H = damped(H, damp)
    width = W.shape[-1] // start.scale.shape[-1]
    scale = start.scale.mT.to(dtype).repeat_interleave(width, dim=-2)  # [..., columns, rows]
    zero = None if start.zero is None else start.zero.mT.to(dtype).repeat_interleave(width, dim=-2)
    steps = start.codes.mT.to(dtype, copy=True)  # [..., columns, rows]
    if zero is not None:
        steps -= zero
    slope = (H @ (start.weight() - W).mT).to(dtype)  # [..., columns, rows]
    H = H.to(dtype)
    for _ in range(passes):
        for first in range(0, steps.shape[-2], width):
            where = slice(first, first + width)  # a group
            inside = steps[..., where, :], slope[..., where, :], H[..., where, where]
            change = _scale_change(scale[..., first, :], *inside, start.scale.dtype)[..., None, :]
            scale[..., where, :] += change
            add_product_(slope, H[..., where], steps[..., where, :] * change)
            update_columns_(quantizer, steps, slope, H, where, scale, zero)
    codes = steps if zero is None else steps + zero
    return replace(
        start,
        codes=codes.mT.to(torch.int8).contiguous(),
        scale=scale[..., ::width, :].mT.to(start.scale.dtype).contiguous(),
    )


def update_columns_(
    quantizer: ColumnQuantizer,
    steps: Tensor,
    slope: Tensor,
    H: Tensor,
    where: slice,
    scale: Tensor,
    zero: Tensor | None,
) -> None:
    """Set the columns `where` in turn to the best codes while all others are fixed.

    `steps`, the codes minus zero points, and `slope`, ``H (W_q - W)^T``, are updated in place. Both
    are [..., columns, rows], as are the scales and zero points.
    """
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    unit = diagonal.clamp_min(torch.finfo(H.dtype).tiny)  # inputs of zero change nothing
    for start in range(where.start, where.stop, quantizer.width):
        block = slice(start, min(start + quantizer.width, where.stop))
        current = steps[..., block, :] * scale[..., block, :]
        delta, steps[..., block, :] = quantizer.quantize(
            current - slope[..., block, :] / unit[..., block, None],
            -H[..., block, block] / unit[..., None, block],
            scale[..., block, :],
            None if zero is None else zero[..., block, :],
            current,
        )
        add_product_(slope, H[..., block], delta)


def _scale_change(
    scale: Tensor, steps: Tensor, slope: Tensor, H: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the best change to the scales [..., rows] of a group, which are stored in `dtype`.

    `steps` and `slope` are [..., width, rows], `H` is [..., width, width].
    """
    first = (steps * slope).sum(dim=-2)  # [..., rows], half the derivative of the error
    second = (steps * (H @ steps)).sum(dim=-2)
    best = scale - torch.where(second > 0, first / second, 0)
    change = best.to(dtype).to(scale) - scale
    helps = (change * (2 * first + change * second) < 0) & (scale + change != 0)
    return torch.where(helps, change, 0)
