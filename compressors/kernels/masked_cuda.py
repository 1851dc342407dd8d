"""Products of few inputs with the sparse forms for which there is a kernel in CUDA C++."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrc.compressors.kernels import few_tokens, nvrtc
from lrc.compressors.kernels.few_tokens import Blocks, Stored, blocks_for
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
    matrix = Stored([stored.values, stored.mask], [], d_out)
    (y,) = few_tokens.multiply("n8_linear.cu", x, [matrix], (("N", stored.n),), blocks)
    return y


def groups(x: Tensor, stored: Sequence[Groups], blocks: Blocks | None = None) -> list[Tensor]:
    """Return the products of one input and matrices that agree in `constants`, by one launch.

    Parameters
    ----------
    x : Tensor, shape [tokens, columns]
        Contiguous and aligned.
    stored : sequence of Groups
    blocks : Blocks, optional

    Returns
    -------
    list of Tensor, shape [tokens, d_out]
    """
    members = [Stored(m[:5], [m.offsets.shape[1]], len(m.offsets)) for m in stored]
    blocks = blocks or blocks_for(len(x), sum([m.d_out for m in members]), x.shape[1])
    return few_tokens.multiply("group_sparse_linear.cu", x, members, constants(stored[0]), blocks)


def constants(stored: Groups) -> nvrtc.Macros:
    """Return what a kernel is compiled for."""
    offsets = "short" if stored.offsets.dtype == torch.int16 else "int"
    return ("BITS", stored.bits), ("GROUP", stored.group), ("OFFSETS", offsets)


def padded(mask: Tensor) -> Tensor:
    """Return a mask [d_out, bytes] with whole blocks of 64 bits, zeros at the end of rows."""
    return torch.nn.functional.pad(mask, (0, -mask.shape[1] % (BLOCK // UNIT))).contiguous()
