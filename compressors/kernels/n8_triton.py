"""Triton kernel for the pattern n:8 with 16-bit values and few inputs.

Value i of a unit of eight columns belongs to one of the columns i to i + 8 - n. The eight inputs of
a unit are four registers, and a byte permutation takes the inputs of two values from two or three
of them. Its selectors depend on the byte of the mask alone and come from a table, so that there is
neither a gather nor a zero that is multiplied: about four instructions a column at n = 4, where
gathering the inputs needs six and most of the first-level cache.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc.compressors.kernels.bits_triton import high_half, low_half, permute_bytes
from lrc.compressors.kernels.mask_places import selectors
from lrc.compressors.kernels.masked_triton import Blocks


def few_rows(
    x: Tensor, values: Tensor, mask: Tensor, n: int, blocks: Blocks | None = None
) -> Tensor:
    """Multiply up to 4 inputs [rows, columns], contiguous, by n values for every eight columns.

    Parameters
    ----------
    x : Tensor, shape [rows, columns]
        bfloat16 or float16, like the values. It starts at a multiple of 16 bytes.
    values : Tensor, shape [d_out, columns / 8, n]
    mask : Tensor, shape [d_out, columns / 8], uint8
    n : int
        In [1, 7].
    """
    rows = len(x)
    d_out, groups = mask.shape
    y = x.new_empty(rows, d_out)
    b = blocks or _blocks(d_out, groups)
    _few_rows[(triton.cdiv(d_out, b.rows),)](
        x,
        values,
        mask,
        table(n, x.device),
        y,
        rows,
        d_out,
        groups,
        N=n,
        T=triton.next_power_of_2(rows),
        R=b.rows,
        G=b.units,
        ASM=x.is_cuda,
        num_warps=b.warps,
        num_stages=b.stages,
    )
    return y


@cache
def table(n: int, device: torch.device) -> Tensor:
    """Return the selectors of all masks on a device."""
    return selectors(n).to(device)


def _blocks(d_out: int, groups: int) -> Blocks:
    warps = 4 if groups > 64 else 2
    return Blocks(4 if d_out >= 2048 else 2, 32 * warps, warps)


@triton.jit
def _inputs(x0, x1, x2, x3, selector, N: tl.constexpr, J: tl.constexpr, ASM: tl.constexpr):
    """Return the inputs of values 2 J and 2 J + 1, which lie in registers J to the last one."""
    last: tl.constexpr = min(3, (2 * J + 9 - N) // 2)
    if J == 0:
        if last == 1:
            pair = permute_bytes(x0, x1, selector, ASM)
        elif last == 2:
            pair = permute_bytes(permute_bytes(x0, x1, selector, ASM), x2, selector >> 16, ASM)
        else:
            left = permute_bytes(x0, x1, selector, ASM)
            right = permute_bytes(x2, x3, selector, ASM)
            pair = permute_bytes(left, right, selector >> 16, ASM)
    elif J == 1:
        if last == 2:
            pair = permute_bytes(x1, x2, selector, ASM)
        else:
            pair = permute_bytes(permute_bytes(x1, x2, selector, ASM), x3, selector >> 16, ASM)
    elif J == 2:
        pair = permute_bytes(x2, x3, selector, ASM)
    else:
        pair = permute_bytes(x3, x3, selector, ASM)
    return pair


@triton.jit
def _add(
    acc,  # [T, R, G]
    x0,  # [T, 1, G], and three more
    x1,
    x2,
    x3,
    selector,  # [R, G]
    values,
    word,  # [R, G], values 2 J and 2 J + 1 if N is even
    at,  # [R, G], index of the first value of a unit
    exists,
    N: tl.constexpr,
    J: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the products of values 2 J and 2 J + 1."""
    dtype: tl.constexpr = values.dtype.element_ty
    pair = _inputs(x0, x1, x2, x3, selector[None], N, J, ASM)  # [T, R, G]
    if N % 2 == 0:
        acc += low_half(word, dtype)[None] * low_half(pair, dtype)
        acc += high_half(word, dtype)[None] * high_half(pair, dtype)
    else:
        place = tl.max_contiguous(tl.multiple_of(at + 2 * J, [1, 1]), [1, 2])
        first = tl.load(values + place, exists, other=0.0).to(tl.float32)
        if 2 * J + 1 < N:
            second = tl.load(values + place + 1, exists, other=0.0).to(tl.float32)
            acc += second[None] * high_half(pair, dtype)
        acc += first[None] * low_half(pair, dtype)
    return acc


@triton.jit
def _few_rows(
    x,  # [n, 8 groups]
    values,  # [d_out, groups, N]
    mask,  # [d_out, groups]
    table,
    y,  # [n, d_out]
    n,
    d_out,
    groups,
    N: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    ASM: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    tokens = tl.arange(0, T)
    start = rows[:, None] * groups
    acc = tl.zeros([T, R, G], tl.float32)
    pairs = values.to(tl.pointer_type(tl.int32))
    units = tl.arange(0, G)
    exists = (rows < d_out)[:, None] & (units < groups)[None, :]
    # The hints are not true, and make all loads have the same layout: one unit a thread, and
    # neighbouring threads along a row. The compiler lets threads follow the dimension that is
    # contiguous, and reads as much at once as is aligned, of which it then knows nothing.
    m = tl.load(
        mask + tl.max_contiguous(tl.multiple_of(start + units[None, :], [1, 1]), [1, 2]),
        exists,
        other=0,
    )
    for first in range(0, groups, G):
        units = first + tl.arange(0, G)
        exists = (rows < d_out)[:, None] & (units < groups)[None, :]
        at = tl.max_contiguous(tl.multiple_of(start + units[None, :], [1, 1]), [1, 2])
        # Values are requested before the selectors, which have to wait for the mask.
        word0 = m
        word1 = m
        word2 = m
        if N == 2:
            word0 = tl.load(pairs + at, exists, other=0)
        elif N == 4:
            both = tl.load(values.to(tl.pointer_type(tl.int64)) + at, exists, other=0)
            word0 = both.to(tl.int32)
            word1 = (both >> 32).to(tl.int32)
        elif N == 6:
            triple = tl.max_contiguous(tl.multiple_of(3 * at, [1, 1]), [1, 2])
            word0 = tl.load(pairs + triple, exists, other=0)
            word1 = tl.load(pairs + triple + 1, exists, other=0)
            word2 = tl.load(pairs + triple + 2, exists, other=0)
        index = tl.max_contiguous(tl.multiple_of(m.to(tl.int32), [1, 1]), [1, 2])
        # The masks of the next block: the first of two loads that wait for each other.
        after = units + G
        more = (rows < d_out)[:, None] & (after < groups)[None, :]
        m = tl.load(
            mask + tl.max_contiguous(tl.multiple_of(start + after[None, :], [1, 1]), [1, 2]),
            more,
            other=0,
        )

        four = tl.arange(0, 4)
        inside = (tokens < n)[:, None, None] & (units < groups)[None, :, None]
        columns = tokens[:, None, None] * (4 * groups) + (units[:, None] * 4 + four[None, :])[None]
        columns = tl.max_contiguous(columns, [1, 2, 4])
        loaded = tl.load(x.to(tl.pointer_type(tl.int32)) + columns, inside, other=0)  # [T, G, 4]
        even, odd = tl.split(tl.reshape(loaded, [T, G, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        x0 = x0[:, None, :]
        x1 = x1[:, None, :]
        x2 = x2[:, None, :]
        x3 = x3[:, None, :]
        if N <= 2:
            chosen = tl.load(table + index)
            acc = _add(acc, x0, x1, x2, x3, chosen, values, word0, at * N, exists, N, 0, ASM)
        elif N <= 4:
            two = tl.load(table.to(tl.pointer_type(tl.int64)) + index)
            s0 = two.to(tl.int32)
            s1 = (two >> 32).to(tl.int32)
            acc = _add(acc, x0, x1, x2, x3, s0, values, word0, at * N, exists, N, 0, ASM)
            acc = _add(acc, x0, x1, x2, x3, s1, values, word1, at * N, exists, N, 1, ASM)
        elif N == 5:
            index = tl.max_contiguous(tl.multiple_of(index * 4, [1, 1]), [1, 2])
            s0 = tl.load(table + index)
            s1 = tl.load(table + index + 1)
            s2 = tl.load(table + index + 2)
            acc = _add(acc, x0, x1, x2, x3, s0, values, word0, at * N, exists, N, 0, ASM)
            acc = _add(acc, x0, x1, x2, x3, s1, values, word1, at * N, exists, N, 1, ASM)
            acc = _add(acc, x0, x1, x2, x3, s2, values, word2, at * N, exists, N, 2, ASM)
        else:  # 16 bits a pair
            all_four = tl.load(table.to(tl.pointer_type(tl.int64)) + index)
            s0 = all_four.to(tl.int32)
            s1 = s0 >> 16
            s2 = (all_four >> 32).to(tl.int32)
            acc = _add(acc, x0, x1, x2, x3, s0, values, word0, at * N, exists, N, 0, ASM)
            acc = _add(acc, x0, x1, x2, x3, s1, values, word1, at * N, exists, N, 1, ASM)
            acc = _add(acc, x0, x1, x2, x3, s2, values, word2, at * N, exists, N, 2, ASM)
            if N == 7:
                s3 = s2 >> 16
                acc = _add(acc, x0, x1, x2, x3, s3, values, word2, at * N, exists, N, 3, ASM)
    out = tl.sum(acc, axis=2).to(y.dtype.element_ty)  # [T, R]
    to = y + tokens[:, None] * d_out + rows[None, :]
    tl.store(to, out, (tokens < n)[:, None] & (rows < d_out)[None, :])
