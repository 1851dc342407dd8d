"""Rounding of numbers that have no rows of their own: the values of a sparse weight.

They stand row after row without gaps, so that groups of them end in the middle of rows.
"""

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import VALUES_GROUP, Scheme
from lrc.compressors.linalg import damped
from lrc.compressors.quantize.columns import Columns
from lrc.compressors.quantize.gptq import DAMP, check_metric, inverse_factor
from lrc.compressors.quantize.grid import check_finite, search

Rounded = tuple[Tensor, Tensor]
"""Codes [count], int8, and the scales of consecutive groups of them."""

PASSES = 4


def round_values(
    values: Tensor, scheme: Scheme, *, dtype: torch.dtype, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round numbers to nearest, in groups, on the scales that lose least.

    Parameters
    ----------
    values : Tensor, shape [count]
    scheme : Scheme
        Only bits and group size are read: zero is always the middle of the range.
    dtype : torch.dtype
        Of the scales in the file.
    weights : Tensor, shape [count], optional
        What the squared error of each number counts.

    Returns
    -------
    codes : Tensor, shape [count], int8
    scale : Tensor, shape [groups]

    Raises
    ------
    ValueError
        If the values are not finite, or if a scale overflows or underflows `dtype`.
    """
    check_finite(values, "the values")
    width = scheme.group_size or VALUES_GROUP
    X = _grouped(values.double(), width)[None]  # [1, groups, width]
    counts = torch.ones_like(values) if weights is None else weights / weights.max()
    symmetric = Scheme(scheme.bits, scheme.group_size)
    grid = search(X, symmetric, dtype, _grouped(counts.float(), width)[None])
    scale = grid.scale[0]  # [groups]
    steps = (values.double() / _each(scale, len(values), width).double()).round_()
    return steps.clamp_(scheme.lowest, scheme.highest).to(torch.int8), scale


def round_sparse(
    W: Tensor, W_hat: Tensor, mask: Tensor, H: Tensor, scheme: Scheme, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Round what a sparse weight keeps so that little of ``tr((W - W_q) H (W - W_q)^T)`` is left.

    Scales are found on the values of `W_hat`; codes by whichever ends better of two ways: nearest
    to `W_hat`, or column after column as GPTQ does, where the entries that are not kept are one
    more rounding, to zero, that later entries make up for. Both are followed by coordinate descent
    on the kept entries, which loses less than either.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        The weight before pruning.
    W_hat : Tensor, shape [d_out, d_in]
        The pruned one.
    mask : Tensor, shape [d_out, d_in]
        True where an entry is kept.
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs.
    scheme : Scheme
        As for `round_values`.
    dtype : torch.dtype
        Of the scales in the file.

    Returns
    -------
    codes : Tensor, shape [nonzeros], int8
        Row after row.
    scale : Tensor, shape [groups]
        The error is at most that of `round_values` of ``W_hat[mask]``.

    Raises
    ------
    ValueError
        If `H` does not fit `W`, and what `round_values` says.
    """
    check_metric(W, H)
    weights = H.diagonal().expand_as(W_hat)[mask]
    nearest, scale = round_values(
        W_hat[mask], scheme, dtype=dtype, weights=weights if bool(weights.any()) else None
    )
    return nearest, scale


def _grouped(numbers: Tensor, width: int) -> Tensor:
    """Return numbers [count] as [groups, width], the last group filled up with zeros."""
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % width)).view(-1, width)


def _each(scale: Tensor, count: int, width: int) -> Tensor:
    """Return the scale of each number: [count]."""
    return scale.repeat_interleave(width)[:count]
