"""Blocks of GGUF: encoding of the integers of lrc, and of floats.

A block holds 32 consecutive numbers of a row: a float16 scale ``d``, in some types a float16
minimum ``m``, and unsigned codes q of 4, 5 or 8 bits. A number is ``d * (q - offset)`` or
``d * q + m``. The lower four bits of the codes j and j + 16 share byte j; the fifth bits of all
codes form one 32-bit word. A scale of lrc that serves several blocks is repeated.

A super-block holds 256 numbers, in 16 groups with an integer scale s each: a number is
``d * s * (q - offset)``.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from lrc.compressors.export.stored_weights import Integers
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.gguf_types import BLOCK, BlockType
from lrc.compressors.layers.quantization_args import SUPER_BLOCK
from lrc.compressors.layers.super_blocks import split_scales


def kind_of(found: BlockType) -> GGMLQuantizationType:
    """Return the type as the gguf package names it."""
    return GGMLQuantizationType[found.name]


def inexact_scales(scale: Tensor, args: QuantizationArgs) -> str | None:
    """Return a clause if GGUF cannot hold scales exactly.

    Its scales are float16; those of super-blocks are multiples of a number in float16.
    """
    if args.super_blocks:
        if split_scales(scale, args) is not None:
            return None
        return f"its scales are no longer multiples of a common number, as those of {args} were"
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
    if found.super_blocks:
        return _super_blocks(found, codes, scale)
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


def _super_blocks(found: BlockType, codes: Tensor, scale: Tensor) -> np.ndarray:
    """Return super-blocks of Q3_K or Q6_K."""
    rows, columns = codes.shape
    blocks = columns // SUPER_BLOCK
    args = QuantizationArgs(found.bits, columns // scale.shape[1], super_blocks=True)
    split = split_scales(scale, args)
    assert split is not None, "inexact_scales has checked them"
    common, multiples = split
    d = common.contiguous().view(torch.uint8).view(rows, blocks, 2)
    s = multiples.repeat_interleave(columns // found.group // scale.shape[1], dim=1)
    s = s.view(rows, blocks, SUPER_BLOCK // found.group)
    q = (codes.view(rows, blocks, SUPER_BLOCK) + (1 << (found.bits - 1))).view(torch.uint8)
    pack = _q3_k if found.bits == 3 else _q6_k
    encoded: np.ndarray = torch.cat(pack(q, s, d), dim=-1).flatten(1).numpy()
    return encoded


def _q3_k(q: Tensor, s: Tensor, d: Tensor) -> list[Tensor]:
    """Return third bits, lower bits, scales and ``d`` of codes q in [0, 8), uint8.

    Byte j of each half of the lower bits has those of the codes j, j + 32, j + 64 and j + 96. Byte
    j of the third bits has those of the codes j, j + 32 and so on. Scales are stored plus 32: the
    lower four bits of s[j] and s[j + 8] share byte j of 8 bytes, and the upper two bits of s[j],
    s[j + 4], s[j + 8] and s[j + 12] byte j of the 4 that follow.
    """
    high = _joined((q >> 2).unflatten(-1, (8, 32)), 1)
    low = _joined((q & 3).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
    stored = (s + 32).view(torch.uint8)
    nibbles = _joined((stored & 0xF).unflatten(-1, (2, 8)), 4)
    rest = _joined((stored >> 4).unflatten(-1, (4, 4)), 2)
    return [high, low, nibbles, rest, d]


def _q6_k(q: Tensor, s: Tensor, d: Tensor) -> list[Tensor]:
    """Return lower bits, upper bits, scales and ``d`` of codes q in [0, 64), uint8.

    Of each half of the codes, byte j of 64 has the lower four bits of the codes j and j + 64, and
    byte j of 32 the upper two of j, j + 32, j + 64 and j + 96.
    """
    low = _joined((q & 0xF).unflatten(-1, (2, 2, 64)), 4).flatten(-2)
    high = _joined((q >> 4).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
    return [low, high, s.view(torch.uint8), d]


def _joined(parts: Tensor, bits: int) -> Tensor:
    """Put fields [..., n, width] of so many bits into bytes [..., width], the first one lowest."""
    joined = torch.zeros_like(parts[..., 0, :])
    for number in range(parts.shape[-2]):
        joined |= parts[..., number, :] << (bits * number)
    return joined


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
