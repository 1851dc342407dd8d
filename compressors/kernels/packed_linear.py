"""Products with packed integers on CUDA devices, which read the stored tensors as they are.

Few tokens are multiplied by tensor cores while the codes are unpacked in registers; for more tokens
the matrix is written once, in the dtype of the input, for cuBLAS.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lrc.compressors.kernels import few_tokens, nvrtc
from lrc.compressors.kernels.cuda_device import cuda_problem
from lrc.compressors.kernels.few_tokens import Blocks, Stored, blocks_for
from lrc.compressors.kernels.implementations import Entry, Need

MOST_TOKENS = 64
"""Tokens above which the matrix is written first: the kernel reads the stored tensors again for
every 32 tokens."""


def product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """Return ``x @ W.T`` [tokens, d_out] for ``x`` [tokens, d_in], unpacking codes in registers."""
    (y,) = products(x, [packed], [scale], [zero_point], bits, blocks)
    return y


def products(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor | None],
    bits: int,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Return `product` for matrices of the same scheme and width, by one launch."""
    x, (tokens, d_in) = x.contiguous(), x.shape
    members = [_stored(*tensors) for tensors in zip(packed, scale, zero_point, strict=True)]
    aligned = d_in % 32 == 0 and few_tokens.starts_at_16_bytes(
        x, *[tensor for member in members for tensor in member.tensors]
    )
    macros = _macros(bits, _group(scale[0], d_in), zero_point[0] is not None, aligned=aligned)
    blocks = blocks or _blocks(tokens, sum([member.d_out for member in members]), d_in, bits)
    return few_tokens.multiply("packed_linear.cu", x, members, macros, blocks)


@cache
def _macros(bits: int, group: int, asymmetric: bool, **others: bool) -> nvrtc.Macros:
    named = {"BITS": bits, "GROUP": group, "ASYMMETRIC": int(asymmetric)}
    return (*named.items(), *((name.upper(), int(value)) for name, value in others.items()))


@cache
def _blocks(tokens: int, d_out: int, d_in: int, bits: int) -> Blocks:
    """Return the fastest division of those that were measured."""
    if max(d_out, d_in) < 8192 and bits != 4:
        return blocks_for(tokens, d_out, d_in, tiles=1)
    if d_in < 8192 and bits > 4:
        return blocks_for(tokens, d_out, d_in, tiles=1, most_warps=3600)
    return blocks_for(tokens, d_out, d_in, most_warps=3600 if bits == 4 else 2100)


def matrix(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Return the dequantized matrix [d_out, columns], in the dtype of `scale`."""
    stored, numbers, _ = _stored(packed, scale, zero_point)
    group, asymmetric = _group(scale, columns), zero_point is not None
    kernel = _matrix_kernel(bits, group, asymmetric, scale.dtype, packed.get_device())
    W = scale.new_empty(len(packed), columns)
    with torch.cuda.device(packed.device):
        kernel((len(packed), -(-columns // 2048), 1), 256, *stored, W, *W.shape, *numbers)
    return W


@cache
def _matrix_kernel(
    bits: int, group: int, asymmetric: bool, dtype: torch.dtype, device: int
) -> nvrtc.Kernel:
    macros = _macros(bits, group, asymmetric, bfloat=dtype == torch.bfloat16)
    return nvrtc.kernel("packed_matrix.cu", "matrix", macros, device)


def _stored(packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> Stored:
    """Return the tensors that kernels take, and the sizes of their rows."""
    packed, scale = packed.contiguous(), scale.contiguous()
    zero = packed if zero_point is None else zero_point.contiguous()
    return Stored([packed, scale, zero], [packed.shape[1], scale.shape[1], len(zero)], len(packed))


def _group(scale: Tensor, columns: int) -> int:
    """Return the columns that share a scale; 0 for all."""
    groups = scale.shape[1]
    return columns // groups if groups > 1 else 0


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    if len(x) == 0:
        return x.new_empty(0, len(packed))
    if len(x) <= MOST_TOKENS:
        return product(x, packed, scale, zero_point, bits)
    return torch.mm(x, matrix(packed, scale, zero_point, bits, x.shape[1]).T)


@torch.library.custom_op("lrc::packed_linear", mutates_args=(), device_types="cuda")
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
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

    Returns
    -------
    Tensor, shape [rows, d_out]
        In the dtype of `x`. Weights are rounded to that dtype, sums are float32.
    """
    return _product(x, packed, scale, zero_point, bits)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _products(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor | None],
    bits: int,
) -> list[Tensor]:
    if 0 < len(x) <= MOST_TOKENS:
        return products(x, packed, scale, zero_point, bits)
    matrices = zip(packed, scale, zero_point, strict=True)
    return [_product(x, *matrix, bits) for matrix in matrices]


@torch.library.custom_op("lrc::packed_linears", mutates_args=(), device_types="cuda")
def packed_linears(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor | None],
    bits: int,
) -> list[Tensor]:
    """Return `packed_linear` for matrices of the same scheme that multiply the same input."""
    return _products(x, packed, scale, zero_point, bits)


@packed_linears.register_fake
def _(x: Tensor, packed: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape[0], matrix.shape[0]) for matrix in packed]


def run(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return ``x @ W.T`` like `packed_linear`; only compiled code pays for a custom operator."""
    if torch.compiler.is_compiling():
        y: Tensor = packed_linear(x, packed, scale, zero_point, bits)
        return y
    return _product(x, packed, scale, zero_point, bits)


Matrix = tuple[Tensor, Tensor, Tensor | None, int]
"""Packed codes, scales, zero points and bits, as `packed_linear` takes them."""


def run_together(x: Tensor, matrices: Sequence[Matrix]) -> list[Tensor] | None:
    """Return the products of one input and several matrices; None if their schemes differ."""
    first_packed, first_scale, first_zero, bits = matrices[0]
    words, groups = first_packed.shape[1], first_scale.shape[1]
    for packed, scale, zero, other_bits in matrices:
        if (packed.shape[1], scale.shape[1], other_bits) != (words, groups, bits):
            return None
        if (zero is None) != (first_zero is None):
            return None
    multiply = packed_linears if torch.compiler.is_compiling() else _products
    together: list[Tensor] = multiply(
        x, [m[0] for m in matrices], [m[1] for m in matrices], [m[2] for m in matrices], bits
    )
    return together


def refuse(need: Need) -> str | None:
    """Return why the kernels do not serve a product; None if they do."""
    d_out, d_in = need.shape
    if d_out * d_in >= 2**31:
        return "2**31 entries or more"
    return cuda_problem(need.device.index or 0)


ENTRIES = [
    Entry(
        "CUDA",
        "packed_linear",
        "cuda",
        range(2, 9),
        run,
        dtypes=(torch.bfloat16, torch.float16),
        refuse=refuse,
        together=run_together,
    )
]
