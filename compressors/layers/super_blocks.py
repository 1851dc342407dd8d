"""Scales of super-blocks: small multiples of a common number, as in the K-quants of llama.cpp.

The scales are stored as they are, so that everything reads such a matrix like any other with as
many groups. A format that stores the multiples instead, in a few bits each, loses nothing.
"""

import torch
from torch import Tensor

from lrc.compressors.layers.quantization_args import SUPER_BLOCK, QuantizationArgs

LARGEST_MULTIPLE = 31
"""Of the common number, in magnitude: what 6 bits with a sign can hold."""
_SMALLEST = 2.0**-24
"""The smallest positive number of float16; all others are multiples of it."""


def common_digits(dtype: torch.dtype) -> int:
    """Return how many binary digits a common number may have, so that scales are exact in `dtype`.

    A product with a multiple of 5 digits has at most 5 more, and float16, in which K-quants store
    the common number, has 11.
    """
    digits = 1 - round(torch.log2(torch.tensor(torch.finfo(dtype).eps)).item())
    return min(digits, 11) - LARGEST_MULTIPLE.bit_length()


def split_scales(scale: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor] | None:
    """Write scales as multiples of a common number of every super-block.

    Parameters
    ----------
    scale : Tensor, shape [rows, groups]
    args : QuantizationArgs
        With super-blocks.

    Returns
    -------
    tuple of Tensor or None
        The common numbers [rows, blocks], float16, and the multiples [rows, groups], int8, whose
        products are the scales exactly; None if there are no such numbers.
    """
    assert args.group_size is not None
    units = scale.double() / _SMALLEST
    whole = units.round()
    if bool((whole != units).any()) or bool((units.abs() > 2**62).any()):
        return None
    each = whole.long().unflatten(1, (-1, SUPER_BLOCK // args.group_size))  # [rows, blocks, groups]
    common = each[..., 0].abs()
    for group in each.unbind(-1)[1:]:
        common = torch.gcd(common, group)
    multiples = each // common.clamp_min(1)[..., None]
    half = (common.double() * _SMALLEST).to(torch.float16)
    exact = half.double() == common.double() * _SMALLEST
    if not bool(exact.all()) or bool((multiples.abs() > LARGEST_MULTIPLE).any()):
        return None
    return half, multiples.flatten(1).to(torch.int8)
