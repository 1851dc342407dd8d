"""Triton kernels for matrices of which some entries are stored, at the places that a mask names.

All kernels see a matrix as units of eight consecutive columns of a row, see `entries_triton`. What
is done with the entries differs: they are multiplied by a few inputs, fed to tensor cores, or
written to a dense matrix.

A thread holds a unit. The eight columns of the input that belong to it stay in registers for all
rows of a block, so that nothing is gathered but values, which neighbouring threads read from
neighbouring places.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lrc.compressors.kernels.bits_triton import join_eight, split_eight
from lrc.compressors.kernels.entries_triton import (
    PRODUCT_BF16,
    PRODUCT_FP16,
    PRODUCT_OPERANDS,
    entries,
    group_products,
    unit,
    words_of,
)
from lrc.compressors.kernels.masked import Masked

UNIT = 8


class Blocks(NamedTuple):
    """Rows and units that a program reads at once; units are best one a thread, 32 a warp."""

    rows: int
    units: int
    warps: int
    stages: int = 2


def arguments(stored: Masked) -> dict[str, Any]:
    """Return the keyword arguments that the kernels have in common."""
    mask, stride = stored.mask, stored.mask.stride(0)
    starts = mask if stored.starts is None else stored.starts
    offsets = mask if stored.offsets is None else stored.offsets
    return {
        "values": stored.values,
        "scale": stored.values if stored.scale is None else stored.scale,
        "mask": mask,
        "starts": starts,
        "offsets": offsets,
        "d_out": stored.d_out,
        "columns": stored.columns,
        "mask_stride": stride,
        "offsets_stride": offsets.stride(0),
        "LAYOUT": stored.layout,
        "N": stored.n,
        "BITS": stored.bits,
        "GROUP": stored.group,
        "ALIGNED": stride % 8 == 0 and mask.data_ptr() % 8 == 0,
        "ASM": mask.is_cuda,
    }


def few_rows(x: Tensor, stored: Masked, blocks: Blocks | None = None) -> Tensor:
    """Multiply up to 4 inputs [n, columns], contiguous, with multiply-adds in float32."""
    n, columns = x.shape
    d_out = stored.d_out
    y = x.new_empty(n, d_out)
    b = blocks or _blocks(d_out, columns)
    _few_rows[(triton.cdiv(d_out, b.rows),)](
        x,
        y,
        n,
        **arguments(stored),
        T=triton.next_power_of_2(n),
        R=b.rows,
        G=b.units,
        num_warps=b.warps,
        num_stages=b.stages,
    )
    return y


def some_rows(x: Tensor, stored: Masked, blocks: Blocks | None = None) -> Tensor:
    """Multiply up to 64 inputs [n, columns], contiguous, with tensor cores."""
    n, _ = x.shape
    d_out = stored.d_out
    y = x.new_empty(n, d_out)
    b = blocks or Blocks(16, 32, 4)
    _some_rows[(triton.cdiv(d_out, b.rows),)](
        x,
        y,
        n,
        **arguments(stored),
        T=max(16, triton.next_power_of_2(n)),
        R=b.rows,
        G=b.units,
        num_warps=b.warps,
        num_stages=b.stages,
    )
    return y


def expand(stored: Masked, blocks: Blocks | None = None) -> Tensor:
    """Return the dense matrix [d_out, columns]."""
    d_out, columns = stored.d_out, stored.columns
    W = stored.mask.new_empty(d_out, columns, dtype=stored.dtype)
    units = triton.cdiv(columns, UNIT)
    b = blocks or Blocks(4, min(128, triton.next_power_of_2(units)), 4)
    grid = (triton.cdiv(d_out, b.rows), triton.cdiv(units, b.units))
    _expand[grid](W, **arguments(stored), R=b.rows, G=b.units, num_warps=b.warps)
    return W


def _blocks(d_out: int, columns: int) -> Blocks:
    """Return blocks that leave enough programs to fill the processor."""
    units = triton.cdiv(columns, UNIT)
    warps = 4 if units > 64 else 2
    rows = 4 if d_out >= 2048 else 2
    return Blocks(rows, 32 * warps, warps)


@triton.jit
def _few_rows(
    x,  # [n, columns]
    y,  # [n, d_out]
    n,
    values,
    scale,
    mask,
    starts,
    offsets,
    d_out,
    columns,
    mask_stride,
    offsets_stride,
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    tokens = tl.arange(0, T)
    row_starts = tl.load(starts + rows, rows < d_out, other=0)[:, None]
    acc = tl.zeros([T, R, G], tl.float32)
    for first in range(0, tl.cdiv(columns, 8), G):
        units = first + tl.arange(0, G)
        exists = (rows < d_out)[:, None] & (units * 8 < columns)[None, :]
        m, place = unit(
            mask, row_starts, offsets, rows[:, None], units[None, :], exists, mask_stride,
            offsets_stride, LAYOUT, N, GROUP, ALIGNED, ASM,
        )  # fmt: skip
        k = units[:, None] * 8 + tl.arange(0, 8)[None, :]  # [G, 8]
        inside = (tokens < n)[:, None, None] & (k < columns)[None]
        at = tl.max_contiguous(tokens[:, None, None] * columns + k[None], [1, 2, 8])
        inputs = tl.load(x + at, inside, other=0.0)
        x0, x1, x2, x3, x4, x5, x6, x7 = split_eight(inputs)  # each [T, G]
        x0 = x0.to(tl.float32)[:, None, :]
        x1 = x1.to(tl.float32)[:, None, :]
        x2 = x2.to(tl.float32)[:, None, :]
        x3 = x3.to(tl.float32)[:, None, :]
        x4 = x4.to(tl.float32)[:, None, :]
        x5 = x5.to(tl.float32)[:, None, :]
        x6 = x6.to(tl.float32)[:, None, :]
        x7 = x7.to(tl.float32)[:, None, :]
        if ASM and T == 1 and BITS == 0 and values.dtype.element_ty.primitive_bitwidth == 16:
            w0, w1, w2, w3, w4, shift = words_of(values, m, place, ASM)
            acc = tl.inline_asm_elementwise(
                PRODUCT_BF16 if values.dtype.element_ty == tl.bfloat16 else PRODUCT_FP16,
                PRODUCT_OPERANDS,
                [
                    acc,
                    x0,
                    x1,
                    x2,
                    x3,
                    x4,
                    x5,
                    x6,
                    x7,
                    w0[None],
                    w1[None],
                    w2[None],
                    w3[None],
                    w4[None],
                    m[None],
                    shift[None],
                ],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        elif LAYOUT == 2:
            acc += group_products(
                values, scale, m, place, x0, x1, x2, x3, x4, x5, x6, x7, BITS, GROUP
            )
        else:
            e0, e1, e2, e3, e4, e5, e6, e7 = entries(
                values, scale, m, place, LAYOUT, BITS, GROUP, ASM
            )
            acc += e0.to(tl.float32)[None] * x0
            acc += e1.to(tl.float32)[None] * x1
            acc += e2.to(tl.float32)[None] * x2
            acc += e3.to(tl.float32)[None] * x3
            acc += e4.to(tl.float32)[None] * x4
            acc += e5.to(tl.float32)[None] * x5
            acc += e6.to(tl.float32)[None] * x6
            acc += e7.to(tl.float32)[None] * x7
    out = tl.sum(acc, axis=2).to(y.dtype.element_ty)  # [T, R]
    to = y + tokens[:, None] * d_out + rows[None, :]
    tl.store(to, out, (tokens < n)[:, None] & (rows < d_out)[None, :])


@triton.jit
def _some_rows(
    x,  # [n, columns]
    y,  # [n, d_out]
    n,
    values,
    scale,
    mask,
    starts,
    offsets,
    d_out,
    columns,
    mask_stride,
    offsets_stride,
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    tokens = tl.arange(0, T)
    row_starts = tl.load(starts + rows, rows < d_out, other=0)[:, None]
    acc = tl.zeros([R, T], tl.float32)
    for first in range(0, tl.cdiv(columns, 8), G):
        units = first + tl.arange(0, G)
        exists = (rows < d_out)[:, None] & (units * 8 < columns)[None, :]
        m, place = unit(
            mask, row_starts, offsets, rows[:, None], units[None, :], exists, mask_stride,
            offsets_stride, LAYOUT, N, GROUP, ALIGNED, ASM,
        )  # fmt: skip
        e0, e1, e2, e3, e4, e5, e6, e7 = entries(values, scale, m, place, LAYOUT, BITS, GROUP, ASM)
        W = tl.reshape(join_eight(e0, e1, e2, e3, e4, e5, e6, e7), [R, 8 * G])
        k = first * 8 + tl.arange(0, 8 * G)
        inside = (tokens < n)[:, None] & (k < columns)[None, :]
        inputs = tl.load(x + tokens[:, None] * columns + k[None, :], inside, other=0.0)
        acc = tl.dot(W.to(x.dtype.element_ty), tl.trans(inputs), acc, input_precision="ieee")
    to = y + tokens[None, :] * d_out + rows[:, None]
    tl.store(to, acc.to(y.dtype.element_ty), (rows < d_out)[:, None] & (tokens < n)[None, :])


@triton.jit
def _expand(
    W,  # [d_out, columns]
    values,
    scale,
    mask,
    starts,
    offsets,
    d_out,
    columns,
    mask_stride,
    offsets_stride,
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    row_starts = tl.load(starts + rows, rows < d_out, other=0)[:, None]
    units = tl.program_id(1) * G + tl.arange(0, G)
    exists = (rows < d_out)[:, None] & (units * 8 < columns)[None, :]
    m, place = unit(
        mask, row_starts, offsets, rows[:, None], units[None, :], exists, mask_stride,
        offsets_stride, LAYOUT, N, GROUP, ALIGNED, ASM,
    )  # fmt: skip
    e0, e1, e2, e3, e4, e5, e6, e7 = entries(values, scale, m, place, LAYOUT, BITS, GROUP, ASM)
    k = units[:, None] * 8 + tl.arange(0, 8)[None, :]  # [G, 8]
    to = W + rows[:, None, None].to(tl.int64) * columns + k[None]
    joined = join_eight(e0, e1, e2, e3, e4, e5, e6, e7)  # [R, G, 8]
    tl.store(to, joined, (rows < d_out)[:, None, None] & (k < columns)[None])
