"""Search for the scales of super-blocks, which are small multiples of a common number."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrc.compressors.layers.super_blocks import common_digits

LARGEST_OF_FLOAT16 = 65504
SMALLEST_OF_FLOAT16 = 2.0**-24
ErrorOf = Callable[[Tensor], Tensor]
"""Scales [rows, groups] -> squared errors of rounding to them [rows, groups]."""


def common_scales(
    scale: Tensor, groups: int, largest: int, dtype: torch.dtype, error_of: ErrorOf
) -> Tensor:
    """Replace scales by multiples of one number for every super-block.

    The largest scale of a super-block becomes the largest multiple, or little less where the common
    number is rounded. Of every other group, the neighbouring multiples are tried as well. Larger
    common numbers do not lower the error.

    Parameters
    ----------
    scale : Tensor, shape [rows, n_groups]
        The best scales without the condition.
    groups : int
        Groups of a super-block.
    largest : int
        Largest multiple.
    dtype : torch.dtype
        Dtype of the stored scales, in which the products are exact.
    error_of : callable

    Returns
    -------
    Tensor, shape [rows, n_groups], `dtype`
    """
    wanted = scale.double().unflatten(1, (-1, groups))  # [rows, blocks, groups]
    size = wanted.abs().amax(2, keepdim=True)
    digits = common_digits(dtype, largest)
    common = round_up(size / largest, digits)
    limit = limits(common, largest, dtype)
    chosen = multiples(wanted / common, limit)
    best = _blocks(error_of, common * chosen)
    for step in (-1, 1):
        # Away from or towards zero, but never onto it.
        tried = multiples(chosen + step * chosen.sign(), limit, toward=chosen)
        error = _blocks(error_of, common * tried)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, tried, chosen)
    return (common * chosen).flatten(1).to(dtype)


def round_up(numbers: Tensor, digits: int) -> Tensor:
    """Return the next numbers of float16 with at most so many binary digits; at least one unit."""
    unit = torch.exp2(torch.floor(torch.log2(numbers.clamp_min(SMALLEST_OF_FLOAT16))) - digits + 1)
    unit = unit.clamp_min(SMALLEST_OF_FLOAT16)
    return (numbers / unit).ceil().clamp_min(1).mul(unit).clamp_max(LARGEST_OF_FLOAT16)


def limits(common: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """Return the largest multiples, up to `largest`, that do not overflow."""
    return (torch.finfo(dtype).max / common).floor().clamp_max(largest)


def multiples(ratio: Tensor, largest: Tensor, toward: Tensor | None = None) -> Tensor:
    """Return the nearest multiples up to `largest`, with the sign of `toward`; never zero."""
    ones = torch.ones_like(ratio)
    sign = ones.copysign(ratio if toward is None else toward)
    return sign * ratio.mul(sign).round().clamp_min(1).minimum(largest)


def _blocks(error_of: ErrorOf, scale: Tensor) -> Tensor:
    return error_of(scale.flatten(1)).view(scale.shape)
