"""Launch products of few tokens, rows of the input, with a matrix that is unpacked in registers.

Matrices that multiply the same input can share a launch: a product of a small matrix takes little
longer than its launch. All sources that include ``cuda/few_tokens.cuh`` take the structure
`Arguments` that is defined there.
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


class Stored(NamedTuple):
    """A matrix as a kernel reads it."""

    tensors: Sequence[Tensor]
    """Contiguous."""
    numbers: Sequence[int]
    """What the kernel needs besides the tensors and sizes."""
    d_out: int
    """Rows of the matrix."""


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
    members: Sequence[Stored],
    macros: nvrtc.Macros,
    blocks: Blocks,
) -> list[Tensor]:
    """Return the products of one input with one or several matrices, by one launch.

    Parameters
    ----------
    source : str
        File in the folder ``cuda``.
    x : Tensor, shape [tokens, d_in], float16 or bfloat16
        Contiguous.
    members : sequence of Stored
        Matrices with equal columns and constants.
    macros : tuple of (str, int or str)
        Constants of the source, besides those of `Blocks`.
    blocks : Blocks

    Returns
    -------
    list of Tensor, shape [tokens, d_out]
    """
    tokens, d_in = x.shape
    kernel = _kernel(source, macros, x.dtype, blocks, len(members), x.get_device())
    products, rows = [], 0
    arguments: list[Tensor | int] = [x, tokens, d_in]
    for member in members:
        y = x.new_empty(tokens, member.d_out)
        products.append(y)
        arguments += [*member.tensors, *member.numbers, y, member.d_out]
        rows += -(-member.d_out // (16 * blocks.tiles))
    grid = rows, -(-tokens // blocks.tokens), 1
    with torch.cuda.device(x.device):
        # The kernel has one parameter, whose fields these are.
        kernel(grid, 32 * blocks.warps, *arguments)
    return products


@cache
def _kernel(
    source: str,
    macros: nvrtc.Macros,
    dtype: torch.dtype,
    blocks: Blocks,
    members: int,
    device: int,
) -> nvrtc.Kernel:
    constants = (
        *macros,
        ("BFLOAT", int(dtype == torch.bfloat16)),
        ("TOKENS", blocks.tokens),
        ("TILES", blocks.tiles),
        ("WARPS", blocks.warps),
        ("STAGES", blocks.stages),
        ("MEMBERS", members),
    )
    return nvrtc.kernel(source, "product", constants, device)


def starts_at_16_bytes(*tensors: Tensor) -> bool:
    """Return whether all tensors start at a multiple of 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
