"""Triton kernel for sparse rows with 16-bit values and few inputs.

A thread reads the values of a unit of eight columns as words of 32 bits, at once and whether or not
their number is known, and shifts one value out for every bit of the mask. Reading the values one by
one needs an address and a predicate for each, and leaves few reads in flight.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrc.compressors.kernels.bits_triton import count_bits, low_half, split_eight
from lrc.compressors.kernels.masked_triton import Blocks, Stored, _blocks, _unit


def few_rows(x: Tensor, stored: Stored, blocks: Blocks | None = None) -> Tensor:
    """Multiply up to 4 inputs [n, columns], contiguous, by values that are not quantized."""
    n, columns = x.shape
    d_out = stored.shape[0]
    y = x.new_empty(n, d_out)
    b = blocks or _blocks(d_out, columns)
    arguments = stored.arguments()
    for name in ("scale", "BITS", "GROUP"):
        del arguments[name]
    _few_rows[(triton.cdiv(d_out, b.rows),)](
        x,
        y,
        n,
        **arguments,
        T=triton.next_power_of_2(n),
        R=b.rows,
        G=b.units,
        num_warps=b.warps,
        num_stages=b.stages,
    )
    return y


@triton.jit
def _following(word, after, shift):
    """Return 32 bits of two words that follow each other, `shift` bits from the first one on."""
    both = (after.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
    return (both >> shift).to(tl.int32)


@triton.jit
def _few_rows(
    x,  # [n, columns]
    y,  # [n, d_out]
    n,
    values,
    mask,
    starts,
    offsets,
    d_out,
    columns,
    mask_stride,
    offsets_stride,
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    ALIGNED: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    dtype: tl.constexpr = values.dtype.element_ty
    rows = tl.program_id(0) * R + tl.arange(0, R)
    tokens = tl.arange(0, T)
    acc = tl.zeros([T, R, G], tl.float32)
    for first in range(0, tl.cdiv(columns, 8), G):
        units = first + tl.arange(0, G)
        exists = (rows < d_out)[:, None] & (units * 8 < columns)[None, :]
        m, place = _unit(
            mask, starts, offsets, rows[:, None], units[None, :], exists, mask_stride,
            offsets_stride, LAYOUT, N, 1, ALIGNED,
        )  # fmt: skip
        # An odd place is the upper half of its word. The last word may have a half behind the last
        # value of all, which is never shifted out.
        odd = place & 1
        words = values.to(tl.pointer_type(tl.int32)) + (place >> 1)
        needed = odd + count_bits(m)
        w0 = tl.load(words, needed > 0, other=0)
        w1 = tl.load(words + 1, needed > 2, other=0)
        w2 = tl.load(words + 2, needed > 4, other=0)
        w3 = tl.load(words + 3, needed > 6, other=0)
        w4 = tl.load(words + 4, needed > 8, other=0)
        k = units[:, None] * 8 + tl.arange(0, 8)[None, :]  # [G, 8]
        inside = (tokens < n)[:, None, None] & (k < columns)[None]
        inputs = tl.load(x + tokens[:, None, None] * columns + k[None], inside, other=0.0)
        x0, x1, x2, x3, x4, x5, x6, x7 = split_eight(inputs)  # each [T, G]
        shift = (odd * 16).to(tl.int64)
        v0 = _following(w0, w1, shift)
        v1 = _following(w1, w2, shift)
        v2 = _following(w2, w3, shift)
        v3 = _following(w3, w4, shift)
        # After column k, at most 7 - k values are left.
        bit = (m & 1) != 0
        acc = _add(acc, v0, x0, bit, dtype)
        v0 = tl.where(bit, _following(v0, v1, 16), v0)
        v1 = tl.where(bit, _following(v1, v2, 16), v1)
        v2 = tl.where(bit, _following(v2, v3, 16), v2)
        v3 = tl.where(bit, v3 >> 16, v3)
        bit = (m & 2) != 0
        acc = _add(acc, v0, x1, bit, dtype)
        v0 = tl.where(bit, _following(v0, v1, 16), v0)
        v1 = tl.where(bit, _following(v1, v2, 16), v1)
        v2 = tl.where(bit, _following(v2, v3, 16), v2)
        bit = (m & 4) != 0
        acc = _add(acc, v0, x2, bit, dtype)
        v0 = tl.where(bit, _following(v0, v1, 16), v0)
        v1 = tl.where(bit, _following(v1, v2, 16), v1)
        v2 = tl.where(bit, v2 >> 16, v2)
        bit = (m & 8) != 0
        acc = _add(acc, v0, x3, bit, dtype)
        v0 = tl.where(bit, _following(v0, v1, 16), v0)
        v1 = tl.where(bit, _following(v1, v2, 16), v1)
        bit = (m & 16) != 0
        acc = _add(acc, v0, x4, bit, dtype)
        v0 = tl.where(bit, _following(v0, v1, 16), v0)
        v1 = tl.where(bit, v1 >> 16, v1)
        bit = (m & 32) != 0
        acc = _add(acc, v0, x5, bit, dtype)
        v0 = tl.where(bit, _following(v0, v1, 16), v0)
        bit = (m & 64) != 0
        acc = _add(acc, v0, x6, bit, dtype)
        v0 = tl.where(bit, v0 >> 16, v0)
        acc = _add(acc, v0, x7, (m & 128) != 0, dtype)
    out = tl.sum(acc, axis=2).to(y.dtype.element_ty)  # [T, R]
    to = y + tokens[:, None] * d_out + rows[None, :]
    tl.store(to, out, (tokens < n)[:, None] & (rows < d_out)[None, :])


@triton.jit
def _add(acc, word, x, bit, dtype: tl.constexpr):
    """Add the product of the value in the lower half of a word, where its bit is set."""
    product = low_half(word, dtype)[None] * x.to(tl.float32)[:, None, :]
    return tl.where(bit[None], acc + product, acc)
