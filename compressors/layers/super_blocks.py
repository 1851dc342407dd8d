"""Scales of super-blocks: small multiples of a common number, as in the K-quants of llama.cpp.

The scales are stored as they are, so that everything reads such a matrix like any other with as
many groups. A format that stores the multiples instead, in a few bits each, loses nothing.
"""

import torch
from torch import Tensor

from lrc.compressors.layers.quantization_args import SUPER_BLOCK, QuantizationArgs

DIGITS = 11
"""Binary digits of float16, in which K-quants store the common number."""
_SMALLEST = 2.0**-24
"""The smallest positive number of float16; all others are multiples of it."""


def largest_multiple(args: QuantizationArgs) -> int:
    """Return the largest multiple in magnitude: of 6 bits up to 3 bits (Q3_K), else of 8 (Q6_K)."""
    return 31 if args.bits <= 3 else 127


def common_digits(dtype: torch.dtype, largest: int) -> int:
    """Return how many binary digits a common number may have, so that scales are exact in `dtype`.

    A product with a multiple up to `largest` has at most as many more as that has.
    """
    digits = 1 - round(torch.log2(torch.tensor(torch.finfo(dtype).eps)).item())
    return min(digits, DIGITS) - largest.bit_length()


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
        products are the scales exactly; None if there are no such numbers. Any other multiple of
        the common numbers is exact in the dtype of the scales, too.
    """
    assert args.group_size is not None
    largest = largest_multiple(args)
    units = scale.double() / _SMALLEST
    whole = units.round()
    if bool((whole != units).any()) or bool((units.abs() > 2**62).any()):
        return None
    each = whole.long().unflatten(1, (-1, SUPER_BLOCK // args.group_size))  # [rows, blocks, groups]
    divisor = each[..., 0].abs()
    for group in each.unbind(-1)[1:]:
        divisor = torch.gcd(divisor, group)
    common = _few_digits(divisor.clamp_min(1), common_digits(scale.dtype, largest), largest)
    multiples = each // common.clamp_min(1)[..., None]
    if bool((common == 0).any()) or bool((multiples.abs() > largest).any()):
        return None
    half = (common.double() * _SMALLEST).to(torch.float16)
    if not bool((half.double() == common.double() * _SMALLEST).all()):
        return None
    return half, multiples.flatten(1).to(torch.int8)


def _few_digits(divisor: Tensor, digits: int, largest: int) -> Tensor:
    """Return the largest divisors of positive integers that have few digits; 0 where none has.

    The multiples of a block can have a common divisor, with which the common number would have more
    digits. It is one of the multiples at most.
    """
    found = torch.zeros_like(divisor)
    for part in range(1, largest + 1):
        quotient = divisor // part
        odd = quotient // (quotient & -quotient).clamp_min(1)
        fits = (found == 0) & (quotient * part == divisor) & (odd < 1 << digits)
        found = torch.where(fits, quotient, found)
        if bool((found > 0).all()):
            break
    return found
