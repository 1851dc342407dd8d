"""Triton kernels for products with packed integers, in the layout of the stored words.

Code i of a row takes bits ``i * bits`` and following of the row's words. A *unit* is the smallest
run of codes that fills whole words: one word for 2, 4 and 8 bits, otherwise 32 codes in `bits`
words. A code in the low bits of 0x4B000000, which is 2**23 as float32, makes 2**23 + code, so that
no integer is converted. This file imports torch and Triton only, to be timed without lrc.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES_K = 8
"""Threads of a warp along a row; the other 4 are for different rows. Neighbours along a row read
inputs 64 bytes apart, so that more of them would make the cache serve one line per thread."""
LANES_N = 4


@dataclass(frozen=True)
class VectorConfig:
    """Sizes of `_vector_kernel`."""

    repeats: int
    """Rows of the matrix per thread."""
    warps: int
    """Warps of a block; all of them work on the same rows."""


@dataclass(frozen=True)
class TileConfig:
    """Sizes of `_tile_kernel`."""

    block_n: int
    block_k: int
    warps: int
    stages: int


def vector_config(rows: int, bits: int, d_out: int, d_in: int) -> VectorConfig:
    """Return sizes for a matrix and up to 4 rows of inputs. Not tuned yet, but reasoned.

    Reading at full speed needs 4 MB under way, so all words of small matrices at once: about 2,000
    warps of 4 rows a thread.
    """
    repeats = 4 if d_out >= 4096 else 2 if d_out >= 2048 else 1
    if rows > 2:
        repeats = min(repeats, 2)  # accumulators of every row of inputs take registers
    words = d_in * bits // 32
    warps = 1
    while warps < 8 and warps * _tile_words(bits) < words:
        warps *= 2
    return VectorConfig(repeats, warps)


def tile_config(rows: int, bits: int, d_out: int, d_in: int, group_size: int) -> TileConfig:
    """Return sizes for a matrix and more than 4 rows of inputs. Not tuned yet."""
    block_k = 128
    while group_size and group_size % block_k and block_k > 32:
        block_k //= 2
    return TileConfig(32 if d_out * rows < 1 << 17 else 64, block_k, 4, 3)


def _tile_words(bits: int) -> int:
    """Return the words of a row that a warp reads at a time; threads read 16 bytes if they can."""
    return LANES_K * (4 if 32 % bits == 0 else bits)


@triton.jit
def _zero_points(zero_ptr, rows, groups_at, n_groups, mask, BITS: tl.constexpr):
    """Return zero points as signed float32; they are packed along the rows of the matrix."""
    bit = rows * BITS
    address = zero_ptr + (bit // 32) * n_groups + groups_at
    shift = (bit % 32).to(tl.uint32)
    code = tl.load(address, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        straddles = bit % 32 + BITS > 32
        high = tl.load(address + n_groups, mask=mask & straddles, other=0)
        # A shift by 32 is undefined, and only happens where `high` is 0.
        code = code | (high.to(tl.uint32, bitcast=True) << ((32 - shift) & 31))
    return (code & ((1 << BITS) - 1)).to(tl.float32) - (1 << (BITS - 1))


@triton.jit
def _vector_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    d_out,
    d_in,
    n_words,
    n_groups,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # 0 for one scale per row
    ASYMMETRIC: tl.constexpr,
    QUADS: tl.constexpr,  # four inputs of 16 bits are loaded at once
    REPEATS: tl.constexpr,
    WARPS: tl.constexpr,
    UNITS: tl.constexpr,  # units of a row that a warp reads at a time
):
    """Multiply up to four rows of inputs; sums stay in threads until the end.

    Tiles are [REPEATS, WARPS, 4, UNITS]: Triton places the last two axes on the threads of a warp,
    the second on warps, and the first on registers. Rows of the matrix are on the axes 0 and 2.
    """
    CODES: tl.constexpr = 32 // BITS if 32 % BITS == 0 else 32  # of a unit
    WORDS: tl.constexpr = CODES * BITS // 32
    OFFSET: tl.constexpr = 1 << (BITS - 1)
    r = tl.arange(0, REPEATS)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    lane = tl.arange(0, 4)[None, None, :, None]
    place = tl.arange(0, UNITS)[None, None, None, :]
    n = tl.program_id(0) * (REPEATS * 4) + r * 4 + lane  # [R, 1, 4, 1]
    inside = n < d_out
    row = packed_ptr + n.to(tl.int64) * n_words
    x_type = x_ptr.dtype.element_ty
    zeros = tl.zeros([REPEATS, WARPS, 4, UNITS], tl.float32)
    sum0 = zeros
    sum1 = zeros
    sum2 = zeros
    sum3 = zeros
    for start in range(0, n_words, WARPS * UNITS * WORDS):
        first = start + (warp * UNITS + place) * WORDS + zeros.to(tl.int32) * 0  # [R, W, 4, U]
        k = first // WORDS * CODES
        part0 = zeros
        part1 = zeros
        part2 = zeros
        part3 = zeros
        total0 = zeros
        total1 = zeros
        total2 = zeros
        total3 = zeros
        word = tl.load(row + first, mask=inside & (first < n_words), other=0)
        word = word.to(tl.uint32, bitcast=True)
        for j in tl.static_range(CODES):
            if (j * BITS) % 32 == 0 and j > 0:
                at = first + (j * BITS) // 32
                word = tl.load(row + at, mask=inside & (at < n_words), other=0)
                word = word.to(tl.uint32, bitcast=True)
            code = word >> ((j * BITS) % 32)
            if (j * BITS) % 32 + BITS > 32:
                at = first + (j * BITS) // 32 + 1
                word = tl.load(row + at, mask=inside & (at < n_words), other=0)
                word = word.to(tl.uint32, bitcast=True)
                code = code | (word << (32 - (j * BITS) % 32))
            code = (code & ((1 << BITS) - 1)) | 0x4B000000
            value = code.to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)
            if GROUP > 0 and GROUP % CODES != 0:  # a unit may belong to several groups
                group = (k + j) // GROUP
                valid = inside & (k + j < d_in)
                if ASYMMETRIC:
                    value -= _zero_points(zero_ptr, n, group, n_groups, valid, BITS)
                value *= tl.load(scale_ptr + n * n_groups + group, mask=valid, other=0).to(
                    tl.float32
                )
            for m in tl.static_range(ROWS):
                if QUADS:
                    if j % 4 == 0:
                        quads = x_ptr.to(tl.pointer_type(tl.int64))
                        quad = tl.load(quads + (m * d_in + k + j) // 4, mask=k + j < d_in, other=0)
                        if m == 0:
                            quad0 = quad
                        elif m == 1:
                            quad1 = quad
                        elif m == 2:
                            quad2 = quad
                        else:
                            quad3 = quad
                    if m == 0:
                        quad = quad0
                    elif m == 1:
                        quad = quad1
                    elif m == 2:
                        quad = quad2
                    else:
                        quad = quad3
                    half = (quad >> (16 * (j % 4))).to(tl.int16)
                    x = half.to(x_type, bitcast=True).to(tl.float32)
                else:
                    x = tl.load(x_ptr + m * d_in + k + j, mask=k + j < d_in, other=0)
                    x = x.to(tl.float32)
                if m == 0:
                    part0 += value * x
                    total0 += x
                elif m == 1:
                    part1 += value * x
                    total1 += x
                elif m == 2:
                    part2 += value * x
                    total2 += x
                else:
                    part3 += value * x
                    total3 += x
        if GROUP % CODES == 0 and (GROUP > 0 or ASYMMETRIC):
            group = k // GROUP if GROUP > 0 else k * 0
            valid = inside & (k < d_in)
            if ASYMMETRIC:
                zero = _zero_points(zero_ptr, n, group, n_groups, valid, BITS)
                part0 -= zero * total0
                part1 -= zero * total1
                part2 -= zero * total2
                part3 -= zero * total3
            if GROUP > 0:
                scale = tl.load(scale_ptr + n * n_groups + group, mask=valid, other=0)
                scale = scale.to(tl.float32)
                part0 *= scale
                part1 *= scale
                part2 *= scale
                part3 *= scale
        sum0 += part0
        sum1 += part1
        sum2 += part2
        sum3 += part3
    n_out = tl.program_id(0) * (REPEATS * 4) + (
        tl.arange(0, REPEATS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    )
    for m in tl.static_range(ROWS):
        if m == 0:
            total = sum0
        elif m == 1:
            total = sum1
        elif m == 2:
            total = sum2
        else:
            total = sum3
        y = tl.sum(tl.sum(total, 3), 1)  # [R, 4]
        if GROUP == 0:
            y *= tl.load(scale_ptr + n_out, mask=n_out < d_out, other=0).to(tl.float32)
        tl.store(y_ptr + m * d_out + n_out, y.to(y_ptr.dtype.element_ty), mask=n_out < d_out)


@triton.jit
def _codes(
    packed_ptr,
    n,
    start,
    d_out,
    d_in,
    n_words,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return signed codes [BLOCK_N, BLOCK_K] as float32, for rows n [BLOCK_N] and columns at start.

    Columns after the last one are not zero; `start` is a multiple of 32.
    """
    row = packed_ptr + n.to(tl.int64)[:, None] * n_words
    if 32 % BITS == 0:
        CODES: tl.constexpr = 32 // BITS
        at = start // CODES + tl.arange(0, BLOCK_K // CODES)[None, :]
        words = tl.load(row + at, mask=(n < d_out)[:, None] & (at < n_words), other=0)
        words = words.to(tl.uint32, bitcast=True)
        shifts = (tl.arange(0, CODES) * BITS).to(tl.uint32)
        code = tl.reshape(words[:, :, None] >> shifts[None, None, :], [BLOCK_N, BLOCK_K])
    else:  # words are loaded once per code, most of them from the cache
        k = start + tl.arange(0, BLOCK_K)[None, :]
        bit = k * BITS
        mask = (n < d_out)[:, None] & (k < d_in)
        shift = (bit % 32).to(tl.uint32)
        code = tl.load(row + bit // 32, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
        straddles = bit % 32 + BITS > 32
        high = tl.load(row + bit // 32 + 1, mask=mask & straddles, other=0)
        code = code | (high.to(tl.uint32, bitcast=True) << ((32 - shift) & 31))
    code = (code & ((1 << BITS) - 1)) | 0x4B000000
    return code.to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))


@triton.jit
def _tile_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    rows,
    d_out,
    d_in,
    n_words,
    n_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply tiles with tensor cores. Codes are exact in 16 bits, scales multiply sums."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_type = x_ptr.dtype.element_ty
    PER_TILE: tl.constexpr = GROUP == 0 or GROUP % BLOCK_K == 0
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (n < d_out)[:, None] & (k < d_in)[None, :]
        x_at = x_ptr + m.to(tl.int64)[:, None] * d_in + k[None, :]
        x = tl.load(x_at, mask=(m < rows)[:, None] & (k < d_in)[None, :], other=0)
        codes = _codes(packed_ptr, n, start, d_out, d_in, n_words, BITS, BLOCK_N, BLOCK_K)
        if PER_TILE:
            group = start // GROUP if GROUP > 0 else 0
            if ASYMMETRIC:
                zero = _zero_points(zero_ptr, n, group, n_groups, n < d_out, BITS)
                codes -= zero[:, None]
            part = tl.dot(x, tl.trans(codes.to(x_type)), input_precision="ieee")
            if GROUP > 0:
                scale = tl.load(scale_ptr + n * n_groups + group, mask=n < d_out, other=0)
                part *= scale.to(tl.float32)[None, :]
            sums += part
        else:
            group = (k // GROUP)[None, :]
            if ASYMMETRIC:
                codes -= _zero_points(zero_ptr, n[:, None], group, n_groups, inside, BITS)
            scale = tl.load(scale_ptr + n[:, None] * n_groups + group, mask=inside, other=0)
            matrix = (codes * scale.to(tl.float32)).to(x_type)
            sums += tl.dot(x, tl.trans(matrix), input_precision="ieee")
    if GROUP == 0:
        sums *= tl.load(scale_ptr + n, mask=n < d_out, other=0).to(tl.float32)[None, :]
    y_at = y_ptr + m.to(tl.int64)[:, None] * d_out + n[None, :]
    mask = (m < rows)[:, None] & (n < d_out)[None, :]
    tl.store(y_at, sums.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _matrix_kernel(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    matrix_ptr,
    d_out,
    d_in,
    n_words,
    n_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the dequantized matrix."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    n, k = rows[:, None], start + tl.arange(0, BLOCK_K)[None, :]
    inside = (n < d_out) & (k < d_in)
    group = k // GROUP if GROUP > 0 else k * 0
    codes = _codes(packed_ptr, rows, start, d_out, d_in, n_words, BITS, BLOCK_N, BLOCK_K)
    if ASYMMETRIC:
        codes -= _zero_points(zero_ptr, n, group, n_groups, inside, BITS)
    scale = tl.load(scale_ptr + n * n_groups + group, mask=inside, other=0).to(tl.float32)
    values = (codes * scale).to(matrix_ptr.dtype.element_ty)
    tl.store(matrix_ptr + n.to(tl.int64) * d_in + k, values, mask=inside)


def vector_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    config: VectorConfig | None = None,
) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] for ``x`` [rows, d_in] of at most 4 rows."""
    x = x.contiguous()
    (rows, d_in), (d_out, n_words), n_groups = x.shape, packed.shape, scale.shape[1]
    config = config or vector_config(rows, bits, d_out, d_in)
    y = x.new_empty(rows, d_out)
    quads = x.element_size() == 2 and d_in % 4 == 0 and x.data_ptr() % 8 == 0
    _vector_kernel[(triton.cdiv(d_out, LANES_N * config.repeats),)](
        x,
        packed,
        scale,
        scale if zero_point is None else zero_point,
        y,
        d_out,
        d_in,
        n_words,
        n_groups,
        ROWS=rows,
        BITS=bits,
        GROUP=d_in // n_groups if n_groups > 1 else 0,
        ASYMMETRIC=zero_point is not None,
        QUADS=quads,
        REPEATS=config.repeats,
        WARPS=config.warps,
        UNITS=LANES_K * 4 if 32 % bits == 0 else LANES_K,
        num_warps=config.warps,
    )
    return y


def tile_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    config: TileConfig | None = None,
) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] for ``x`` [rows, d_in], with tensor cores."""
    x = x.contiguous()
    (rows, d_in), (d_out, n_words), n_groups = x.shape, packed.shape, scale.shape[1]
    group = d_in // n_groups if n_groups > 1 else 0
    config = config or tile_config(rows, bits, d_out, d_in, group)
    y = x.new_empty(rows, d_out)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    _tile_kernel[(triton.cdiv(d_out, config.block_n), triton.cdiv(rows, block_m))](
        x,
        packed,
        scale,
        scale if zero_point is None else zero_point,
        y,
        rows,
        d_out,
        d_in,
        n_words,
        n_groups,
        BITS=bits,
        GROUP=group,
        ASYMMETRIC=zero_point is not None,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


def dequantized(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Return the matrix [d_out, columns], in the dtype of `scale`."""
    (d_out, n_words), n_groups = packed.shape, scale.shape[1]
    matrix = scale.new_empty(d_out, columns)
    block_n, block_k = 8, 256
    _matrix_kernel[(triton.cdiv(d_out, block_n), triton.cdiv(columns, block_k))](
        packed,
        scale,
        scale if zero_point is None else zero_point,
        matrix,
        d_out,
        columns,
        n_words,
        n_groups,
        BITS=bits,
        GROUP=columns // n_groups if n_groups > 1 else 0,
        ASYMMETRIC=zero_point is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return matrix


def matrix_product(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] with a temporary matrix and cuBLAS."""
    matrix = dequantized(packed, scale, zero_point, bits, x.shape[1])
    return torch.mm(x, matrix.T)


VECTOR_ROWS, TILE_ROWS = 4, 32
"""Largest numbers of rows for which threads and tensor cores multiply packed integers. Not
measured yet."""


def product(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] with the kernel for that number of rows."""
    if len(x) == 0:
        return x.new_empty(0, len(packed))
    if len(x) <= VECTOR_ROWS:
        return vector_product(x, packed, scale, zero_point, bits)
    if len(x) <= TILE_ROWS:
        return tile_product(x, packed, scale, zero_point, bits)
    return matrix_product(x, packed, scale, zero_point, bits)
