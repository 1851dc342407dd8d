"""The block types of GGUF that store the integers of lrc, and those that floats are rounded to.

A block holds 32 consecutive numbers of a row: a float16 scale ``d``, in some types a float16
minimum ``m``, and unsigned codes q of 4, 5 or 8 bits. A number is ``d * (q - offset)`` or
``d * q + m``. The lower four bits of the codes j and j + 16 share byte j; the fifth bits of all
codes form one 32-bit word. A scale of lrc that serves several blocks is repeated.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from lrc.compressors.export.stored_weights import Integers
from lrc.compressors.layers import QuantizationArgs

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A block type, and the schemes of lrc that it stores."""

    kind: GGMLQuantizationType
    bits: int
    """Of a code."""
    symmetric: bool
    """Whether blocks have no minimum."""


BLOCK_TYPES = (
    BlockType(GGMLQuantizationType.Q4_0, 4, True),
    BlockType(GGMLQuantizationType.Q4_1, 4, False),
    BlockType(GGMLQuantizationType.Q5_0, 5, True),
    BlockType(GGMLQuantizationType.Q5_1, 5, False),
    BlockType(GGMLQuantizationType.Q8_0, 8, True),
)
"""In ascending order of size."""


def block_type(args: QuantizationArgs, columns: int) -> BlockType | str:
    """Return the smallest block type for a matrix, or a clause that says why there is none."""
    if columns % BLOCK:
        return f"its rows of {columns} numbers are not a multiple of {BLOCK}"
    if args.group_size is not None and args.group_size % BLOCK:
        return f"the groups of {args} are not a multiple of {BLOCK}"
    found = (b for b in BLOCK_TYPES if b.symmetric == args.symmetric and b.bits >= args.bits)
    return next(found, f"no block type of GGUF has minimums and codes of {args.bits} bits")


def inexact_scales(scale: Tensor) -> str | None:
    """Return a clause if scales are not exact in float16, the type of scales in GGUF."""
    inexact = scale.float() != scale.to(torch.float16).float()
    if not inexact.any():
        return None
    largest = scale[inexact].abs().max().item()
    return (
        f"{int(inexact.sum())} of {inexact.numel()} scales, up to {largest:.3g}, are not exact in "
        "float16"
    )


def encode_integers(found: BlockType, integers: Integers) -> np.ndarray:
    """Return the blocks of a quantized matrix.

    Parameters
    ----------
    found : BlockType
        As `block_type` returns it.
    integers : Integers
        With scales that are exact in float16.

    Returns
    -------
    ndarray, shape [rows, bytes of a row], uint8
        Minimums are rounded to float16, everything else is exact.
    """
    codes, scale, zero = integers
    rows, columns = codes.shape
    repeats = columns // BLOCK // scale.shape[1]
    parts = [_halves(scale, repeats)]
    offset = 1 << (found.bits - 1)
    if found.bits == 8:
        parts.append(codes.reshape(rows, -1, BLOCK).view(torch.uint8))
    else:
        if zero is not None:
            minimum = -(zero.float() + offset) * scale.float()
            parts.append(_halves(minimum, repeats))
        unsigned = (codes + offset).view(torch.uint8).reshape(rows, -1, BLOCK)
        if found.bits == 5:
            parts.append(_bits(unsigned >> 4))
        low = unsigned & 0xF
        parts.append(low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4))
    return torch.cat(parts, dim=-1).flatten(1).numpy()


def encode_floats(kind: GGMLQuantizationType, matrix: Tensor) -> np.ndarray:
    """Return a tensor in one of the `GGUF_TYPES`, by the reference implementation of gguf."""
    values = matrix.float().contiguous().numpy()
    encoded: np.ndarray = quants.quantize(values, kind)
    return encoded


def _halves(numbers: Tensor, repeats: int) -> Tensor:
    """Return float16 numbers [rows, groups] as bytes [rows, groups * repeats, 2]."""
    halves = numbers.to(torch.float16).repeat_interleave(repeats, dim=1)
    return halves.contiguous().view(torch.uint8).view(*halves.shape, 2)


def _bits(flags: Tensor) -> Tensor:
    """Pack flags [..., 32] of 0 and 1 into bytes [..., 4]; flag j is bit j of a word."""
    packed = np.packbits(flags.numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed)
