"""Products of few inputs with the sparse forms for which there is a kernel in CUDA C++."""

from typing import NamedTuple

import torch
from torch import Tensor

from lrc.compressors.kernels import few_tokens
from lrc.compressors.kernels.few_tokens import Blocks, blocks_for
from lrc.compressors.kernels.mask_places import BLOCK, UNIT

CHUNK = 32
"""The number of columns must be a multiple of this."""


class EightOf(NamedTuple):
    """A matrix with n entries in every eight columns."""

    values: Tensor
    """[d_out, columns / 8, n]"""
    mask: Tensor
    """[d_out, columns / 8], uint8"""
    n: int


class Groups(NamedTuple):
    """A matrix of which some groups of columns are stored as integers."""

    packed: Tensor
    """[1, words], int32"""
    scale: Tensor
    """[groups]"""
    mask: Tensor
    """[d_out, bytes], uint8; `bytes` is a multiple of 8, see `padded`"""
    starts: Tensor
    offsets: Tensor
    """As `starts_and_offsets` returns them."""
    bits: int
    group: int


def serves_eight_of(stored: EightOf, columns: int) -> bool:
    """Return whether there is a kernel for such a matrix."""
    return (
        stored.values.dtype in (torch.float16, torch.bfloat16)
        and columns % CHUNK == 0
        and few_tokens.starts_at_16_bytes(stored.values, stored.mask)
    )


def serves_groups(stored: Groups, columns: int) -> bool:
    """Return whether there is a kernel for such a matrix."""
    group = stored.group
    return (
        stored.scale.dtype in (torch.float16, torch.bfloat16)
        and stored.bits in (2, 4, 8)
        and (group in (8, 16) or group % CHUNK == 0)
        and group * stored.bits >= 32
        and columns % CHUNK == 0
        and stored.mask.shape[1] == UNIT * stored.offsets.shape[1]
        and few_tokens.starts_at_16_bytes(stored.packed, stored.mask)
    )


def eight_of(x: Tensor, stored: EightOf, blocks: Blocks | None = None) -> Tensor:
    """Return ``x @ W.T`` [tokens, d_out] for ``x`` [tokens, columns], contiguous and aligned."""
    (tokens, columns), d_out = x.shape, len(stored.mask)
    blocks = blocks or blocks_for(tokens, d_out, columns, tiles=1, most_warps=3600)
    tensors, y = [stored.values, stored.mask], x.new_empty(tokens, d_out)
    return few_tokens.multiply("n8_linear.cu", x, tensors, y, d_out, [], (("N", stored.n),), blocks)


def groups(x: Tensor, stored: Groups, blocks: Blocks | None = None) -> Tensor:
    """Return ``x @ W.T`` [tokens, d_out] for ``x`` [tokens, columns], contiguous and aligned."""
    (tokens, columns), (d_out, count) = x.shape, stored.offsets.shape
    offsets = "short" if stored.offsets.dtype == torch.int16 else "int"
    macros = ("BITS", stored.bits), ("GROUP", stored.group), ("OFFSETS", offsets)
    blocks = blocks or blocks_for(tokens, d_out, columns)
    return few_tokens.multiply(
        "group_sparse_linear.cu",
        x,
        stored[:5],
        x.new_empty(tokens, d_out),
        d_out,
        [count],
        macros,
        blocks,
    )


def padded(mask: Tensor) -> Tensor:
    """Return a mask [d_out, bytes] with whole blocks of 64 bits, zeros at the end of rows."""
    return torch.nn.functional.pad(mask, (0, -mask.shape[1] % (BLOCK // UNIT))).contiguous()
