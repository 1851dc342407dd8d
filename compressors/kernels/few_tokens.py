"""Launch products of few tokens, rows of the input, with a matrix that is unpacked in registers.

All sources that include ``cuda/few_tokens.cuh`` take the input, the stored tensors, the output, and
the numbers of tokens, rows and columns, in this order.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lrc.compressors.kernels import nvrtc

SHARED_MEMORY = 48 << 10
"""Bytes that a block can have without special permission."""


class Blocks(NamedTuple):
    """How a kernel divides its work; see ``cuda/few_tokens.cuh``."""

    tokens: int
    """Rows of the input per block: 8, 16 or 32."""
    tiles: int
    """Tiles of 16 rows of the matrix per block."""
    warps: int
    """Warps per block, which share the columns."""
    stages: int
    """Chunks of 32 columns that a thread reads ahead."""


@cache
def blocks_for(
    tokens: int, d_out: int, d_in: int, *, tiles: int = 2, most_warps: int = 2100
) -> Blocks:
    """Return how to divide a product.

    As many warps share the columns of a row as there is work for, up to `most_warps` in all blocks:
    about 16 on each of 132 multiprocessors read at full speed. Measured on one H200 with the shapes
    of Llama-3-8B.

    Parameters
    ----------
    tokens, d_out, d_in : int
    tiles : int
        Tiles of 16 rows per block, unless the matrix has few rows.
    most_warps : int
        Of all blocks; a block has at least two all the same.
    """
    of_block = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
    tiles = tiles if d_out >= 4096 else 1
    blocks, steps = -(-d_out // (16 * tiles)), -(-d_in // 128)
    warps = 16
    while warps > 2 and (
        blocks * warps > most_warps
        or warps > steps
        or 4 * warps * of_block * (16 * tiles + 4) > SHARED_MEMORY
    ):
        warps //= 2
    return Blocks(of_block, tiles, warps, 1)


def multiply(
    source: str,
    x: Tensor,
    stored: Sequence[Tensor],
    y: Tensor,
    d_out: int,
    numbers: Sequence[int],
    macros: nvrtc.Macros,
    blocks: Blocks,
) -> Tensor:
    """Launch a kernel and return `y`.

    Parameters
    ----------
    source : str
        File in the folder ``cuda``.
    x : Tensor, shape [tokens, d_in], float16 or bfloat16
    stored : sequence of Tensor
        Contiguous.
    y : Tensor, shape [tokens, ...]
    d_out : int
        Rows of the matrix.
    numbers : sequence of int
        What the kernel needs besides the sizes.
    macros : tuple of (str, int or str)
        Constants of the source, besides those of `Blocks`.
    """
    tokens, d_in = x.shape
    kernel = _kernel(source, macros, x.dtype, blocks, x.get_device())
    grid = -(-d_out // (16 * blocks.tiles)), -(-tokens // blocks.tokens), 1
    with torch.cuda.device(x.device):
        kernel(grid, 32 * blocks.warps, x, *stored, y, tokens, d_out, d_in, *numbers)
    return y


@cache
def _kernel(
    source: str, macros: nvrtc.Macros, dtype: torch.dtype, blocks: Blocks, device: int
) -> nvrtc.Kernel:
    constants = (
        *macros,
        ("BFLOAT", int(dtype == torch.bfloat16)),
        ("TOKENS", blocks.tokens),
        ("TILES", blocks.tiles),
        ("WARPS", blocks.warps),
        ("STAGES", blocks.stages),
    )
    return nvrtc.kernel(source, "product", constants, device)


def starts_at_16_bytes(*tensors: Tensor) -> bool:
    """Return whether all tensors start at a multiple of 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
