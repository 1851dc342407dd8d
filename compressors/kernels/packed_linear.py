"""Products with packed integers on CUDA devices, which read the stored tensors as they are.

Few rows of inputs are multiplied by tensor cores while the codes are unpacked in registers; for more
rows the matrix is written once, in the dtype of the input, for cuBLAS. Sources: packed_linear.cu.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.kernels import nvrtc
from lrc.compressors.kernels.cuda_device import cuda_problem
from lrc.compressors.kernels.implementations import Entry, Need, register

PRODUCT_ROWS = 64
"""Largest number of rows that is multiplied while unpacking."""


@dataclass(frozen=True)
class Blocks:
    """How the kernel divides its work."""

    tokens: int
    """Rows of the input per block: 8, 16, 32 or 64."""
    tiles: int
    """Tiles of 8 rows of the matrix per block."""
    warps: int
    """Warps per block, which share the columns."""
    stages: int
    """Chunks of 32 codes that every thread reads ahead."""


def blocks_for(rows: int, d_out: int, bits: int) -> Blocks:
    """Return how to divide a product of `rows` rows."""
    tokens = 8 if rows <= 8 else 16 if rows <= 16 else 32
    return Blocks(tokens, 2 if d_out >= 4096 else 1, 8, 2 if bits > 4 else 4)


def _group(columns: int, scale: Tensor) -> int:
    return columns // scale.shape[1] if scale.shape[1] > 1 else 0


def product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] for ``x`` [rows, d_in], unpacking codes in registers."""
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    rows, d_in = x.shape
    d_out, words = packed.shape
    blocks = blocks or blocks_for(rows, d_out, bits)
    aligned = d_in % 32 == 0 and x.data_ptr() % 16 == 0 and packed.data_ptr() % 16 == 0
    macros = (
        ("BITS", bits),
        ("GROUP", _group(d_in, scale)),
        ("ASYMMETRIC", int(zero_point is not None)),
        ("BFLOAT", int(x.dtype == torch.bfloat16)),
        ("ALIGNED", int(aligned)),
        ("TOKENS", blocks.tokens),
        ("TILES", blocks.tiles),
        ("WARPS", blocks.warps),
        ("STAGES", blocks.stages),
    )
    y = x.new_empty(rows, d_out)
    zero = packed if zero_point is None else zero_point.contiguous()
    kernel = nvrtc.kernel("packed_linear.cu", "product", macros, x.get_device())
    grid = -(-d_out // (8 * blocks.tiles)), -(-rows // blocks.tokens), 1
    groups = scale.shape[1]
    kernel(
        grid,
        32 * blocks.warps,
        x,
        packed,
        scale,
        zero,
        y,
        rows,
        d_out,
        d_in,
        words,
        groups,
        len(zero),
    )
    return y


def matrix(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Return the dequantized matrix [d_out, columns], in the dtype of `scale`."""
    packed, scale = packed.contiguous(), scale.contiguous()
    d_out, words = packed.shape
    macros = (
        ("BITS", bits),
        ("GROUP", _group(columns, scale)),
        ("ASYMMETRIC", int(zero_point is not None)),
        ("BFLOAT", int(scale.dtype == torch.bfloat16)),
        # The other kernel of the source is compiled too, for nothing.
        ("ALIGNED", 1),
        ("TOKENS", 8),
        ("TILES", 1),
        ("WARPS", 1),
        ("STAGES", 1),
    )
    out = scale.new_empty(d_out, columns)
    zero = packed if zero_point is None else zero_point.contiguous()
    kernel = nvrtc.kernel("packed_linear.cu", "matrix", macros, packed.get_device())
    grid = -(-columns // 2048), d_out, 1
    kernel(grid, 256, packed, scale, zero, out, d_out, columns, words, scale.shape[1], len(zero))
    return out


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    if len(x) == 0:
        return x.new_empty(0, len(packed))
    with torch.cuda.device(x.device):  # kernels are launched on the current device
        if len(x) <= PRODUCT_ROWS:
            return product(x, packed, scale, zero_point, bits)
        return torch.mm(x, matrix(packed, scale, zero_point, bits, x.shape[1]).T)


@torch.library.custom_op("lrc::packed_linear", mutates_args=(), device_types="cuda")
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Return ``x @ W.T`` for a matrix of packed integers.

    Parameters
    ----------
    x : Tensor, shape [rows, columns], float16 or bfloat16
    packed : Tensor, shape [d_out, ceil(columns * bits / 32)], int32
        As `pack_integers` returns them.
    scale : Tensor, shape [d_out, groups]
        In the dtype of `x`.
    zero_point : Tensor, shape [ceil(d_out * bits / 32), groups], int32, or None
        Packed along the rows of the matrix.
    bits : int
        In [2, 8].
    columns : int

    Returns
    -------
    Tensor, shape [rows, d_out]
        In the dtype of `x`. Weights are rounded to that dtype, sums are float32.
    """
    return _product(x, packed, scale, zero_point, bits)


@packed_linear.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def run(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Return ``x @ W.T`` like `packed_linear`, without the cost of an operator if not compiled."""
    if torch.compiler.is_compiling():
        y: Tensor = packed_linear(x, packed, scale, zero_point, bits, columns)
        return y
    return _product(x, packed, scale, zero_point, bits)


def refuse(need: Need) -> str | None:
    """Return why the kernels do not serve a product; None if they do."""
    return cuda_problem(need.device.index or 0)


register(
    Entry(
        "CUDA kernel",
        "packed_linear",
        "cuda",
        range(2, 9),
        run,
        dtypes=(torch.bfloat16, torch.float16),
        refuse=refuse,
    )
)
