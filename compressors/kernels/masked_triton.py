"""Triton kernels for matrices of which some entries are stored, at the places that a mask names.

All kernels see a matrix as units of eight consecutive columns of a row. `_unit` finds the mask of a
unit and the place of its first value, and `_entry` reads one entry; what is done with the entries
differs: they are multiplied by a few inputs, fed to tensor cores, or written to a dense matrix.

A thread holds a unit. The eight columns of the input that belong to it stay in registers for all
rows of a block, so that nothing is gathered but values, which neighbouring threads read from
neighbouring places.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc.compressors.kernels.bits_triton import count_bits, join_eight, split_eight

EIGHT_OF, FREE, GROUPS = 0, 1, 2
"""Layouts: n values for each unit; values row by row without gaps; groups of integers."""
UNIT = 8
FMA_ROWS = 4
"""Up to this many inputs are multiplied without tensor cores, which take 16 at a time."""


class Blocks(NamedTuple):
    """Rows and units that a program reads at once; units are best one a thread, 32 a warp."""

    rows: int
    units: int
    warps: int
    stages: int = 2


class Stored(NamedTuple):
    """A stored matrix; tensors that a layout lacks are given as any other tensor."""

    layout: int
    shape: tuple[int, int]
    values: Tensor
    scale: Tensor
    mask: Tensor
    starts: Tensor
    offsets: Tensor
    n: int = 0
    """Values in a unit, of layout `EIGHT_OF`."""
    bits: int = 0
    """Of the integers; 0 if values are stored as they are."""
    group: int = 1
    """Consecutive values with a common scale; with `GROUPS`, consecutive columns."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.scale.dtype if self.bits else self.values.dtype

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that the kernels have in common."""
        stride = self.mask.stride(0)
        return {
            "values": self.values,
            "scale": self.scale,
            "mask": self.mask,
            "starts": self.starts,
            "offsets": self.offsets,
            "d_out": self.shape[0],
            "columns": self.shape[1],
            "mask_stride": stride,
            "offsets_stride": self.offsets.stride(0) if self.offsets.dim() == 2 else 0,
            "LAYOUT": self.layout,
            "N": self.n,
            "BITS": self.bits,
            "GROUP": self.group,
            "ALIGNED": stride % 8 == 0 and self.mask.data_ptr() % 8 == 0,
        }


def few_rows(x: Tensor, stored: Stored, blocks: Blocks | None = None) -> Tensor:
    """Multiply up to `FMA_ROWS` inputs [n, columns], contiguous, with multiply-adds in float32."""
    n, columns = x.shape
    d_out = stored.shape[0]
    y = x.new_empty(n, d_out)
    b = blocks or _blocks(d_out, columns)
    _few_rows[(triton.cdiv(d_out, b.rows),)](
        x,
        y,
        n,
        **stored.arguments(),
        T=triton.next_power_of_2(n),
        R=b.rows,
        G=b.units,
        num_warps=b.warps,
        num_stages=b.stages,
    )
    return y


def some_rows(x: Tensor, stored: Stored, blocks: Blocks | None = None) -> Tensor:
    """Multiply up to 64 inputs [n, columns], contiguous, with tensor cores."""
    n, _ = x.shape
    d_out = stored.shape[0]
    y = x.new_empty(n, d_out)
    b = blocks or Blocks(16, 32, 4)
    _some_rows[(triton.cdiv(d_out, b.rows),)](
        x,
        y,
        n,
        **stored.arguments(),
        T=max(16, triton.next_power_of_2(n)),
        R=b.rows,
        G=b.units,
        num_warps=b.warps,
        num_stages=b.stages,
    )
    return y


def expand(stored: Stored, blocks: Blocks | None = None) -> Tensor:
    """Return the dense matrix [d_out, columns]."""
    d_out, columns = stored.shape
    W = stored.mask.new_empty(d_out, columns, dtype=stored.dtype)
    units = triton.cdiv(columns, UNIT)
    b = blocks or Blocks(4, min(128, triton.next_power_of_2(units)), 4)
    grid = (triton.cdiv(d_out, b.rows), triton.cdiv(units, b.units))
    _expand[grid](W, **stored.arguments(), R=b.rows, G=b.units, num_warps=b.warps)
    return W


def _blocks(d_out: int, columns: int) -> Blocks:
    """Return blocks that leave enough programs to fill the processor."""
    units = triton.cdiv(columns, UNIT)
    warps = 4 if units > 64 else 2
    rows = 4 if d_out >= 2048 else 2
    return Blocks(rows, 32 * warps, warps)


@triton.jit
def _unit(
    mask,
    starts,
    offsets,
    rows,  # [R, 1]
    units,  # [1, G]
    exists,  # [R, G]
    mask_stride,
    offsets_stride,
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the masks of units, lowest bit first, and the places of their first values."""
    if LAYOUT == 0:
        at = tl.max_contiguous(rows * mask_stride + units, [1, 1])
        unit = tl.load(mask + at, exists, other=0).to(tl.int32)
        place = at * N
    else:
        # A bit of the mask is a column, or a group of columns of which a unit is a part.
        per_group: tl.constexpr = GROUP // 8 if LAYOUT == 2 else 1
        bit = units // per_group if LAYOUT == 2 else units * 8
        bits, place = _bits_from(
            mask, starts, offsets, rows, bit, exists, mask_stride, offsets_stride, ALIGNED
        )
        if LAYOUT == 2:
            unit = tl.where(exists & ((bits & 1) != 0), 255, 0)
            place = place * GROUP + (units % per_group) * 8
        else:
            unit = bits & 255
    return unit, place


@triton.jit
def _bits_from(
    mask,
    starts,
    offsets,
    rows,
    bit,  # [1, G]
    exists,
    mask_stride,
    offsets_stride,
    ALIGNED: tl.constexpr,
):
    """Return the bits of rows from `bit` on, and the number of bits before it in the mask."""
    place = tl.load(starts + rows, exists, other=0)
    place += tl.load(offsets + rows * offsets_stride + bit // 64, exists, other=0).to(tl.int32)
    if ALIGNED:
        words = mask.to(tl.pointer_type(tl.int64)) + rows * (mask_stride // 8) + bit // 64
        word = tl.load(words, exists, other=0)
        low = word.to(tl.int32)
        high = (word >> 32).to(tl.int32)
        shift = bit & 31
        below = (1 << shift) - 1
        upper = (bit & 32) != 0
        place += count_bits(low & tl.where(upper, -1, below))
        place += count_bits(high & tl.where(upper, below, 0))
        bits = tl.where(upper, high, low) >> shift
    else:
        start = mask + rows * mask_stride + bit // 8
        byte = tl.load(start, exists, other=0).to(tl.int32)
        for before in tl.static_range(1, 8):
            inside = exists & (((bit // 8) & 7) >= before)
            place += count_bits(tl.load(start - before, inside, other=0).to(tl.int32))
        place += count_bits(byte & ((1 << (bit & 7)) - 1))
        bits = byte >> (bit & 7)
    return bits, place


@triton.jit
def _entry(values, scale, place, stored, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Return the values at `place`, in the dtype of the matrix; 0 where nothing is stored."""
    if BITS == 0:
        entry = tl.load(values + place, stored, other=0.0)
    else:
        # Code i takes bits BITS * i and following; 32 codes fill BITS words.
        first = (place & 31) * BITS
        word = (place >> 5) * BITS + (first >> 5)
        shift = first & 31
        code = tl.load(values + word, stored, other=0).to(tl.uint32) >> shift.to(tl.uint32)
        if 32 % BITS != 0:
            straddles = stored & (shift + BITS > 32)
            upper = tl.load(values + word + 1, straddles, other=0).to(tl.uint32)
            code |= upper << ((32 - shift) & 31).to(tl.uint32)
        step = (code & ((1 << BITS) - 1)).to(tl.int32) - (1 << (BITS - 1))
        step_size = tl.load(scale + place // GROUP, stored, other=0.0)
        # Rounded like the product of a code and a scale in the dtype of the scale.
        entry = (step.to(tl.float32) * step_size.to(tl.float32)).to(scale.dtype.element_ty)
    return entry


@triton.jit
def _entries(
    values,
    scale,
    mask,
    starts,
    offsets,
    rows,
    units,
    exists,
    mask_stride,
    offsets_stride,
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the eight entries of each unit, each [R, G]."""
    m, p0 = _unit(
        mask, starts, offsets, rows, units, exists, mask_stride, offsets_stride,
        LAYOUT, N, GROUP, ALIGNED,
    )  # fmt: skip
    p1 = p0 + (m & 1)
    p2 = p1 + ((m >> 1) & 1)
    p3 = p2 + ((m >> 2) & 1)
    p4 = p3 + ((m >> 3) & 1)
    p5 = p4 + ((m >> 4) & 1)
    p6 = p5 + ((m >> 5) & 1)
    p7 = p6 + ((m >> 6) & 1)
    e0 = _entry(values, scale, p0, (m & 1) != 0, BITS, GROUP)
    e1 = _entry(values, scale, p1, (m & 2) != 0, BITS, GROUP)
    e2 = _entry(values, scale, p2, (m & 4) != 0, BITS, GROUP)
    e3 = _entry(values, scale, p3, (m & 8) != 0, BITS, GROUP)
    e4 = _entry(values, scale, p4, (m & 16) != 0, BITS, GROUP)
    e5 = _entry(values, scale, p5, (m & 32) != 0, BITS, GROUP)
    e6 = _entry(values, scale, p6, (m & 64) != 0, BITS, GROUP)
    e7 = _entry(values, scale, p7, (m & 128) != 0, BITS, GROUP)
    return e0, e1, e2, e3, e4, e5, e6, e7


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
    T: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    tokens = tl.arange(0, T)
    acc = tl.zeros([T, R, G], tl.float32)
    for first in range(0, tl.cdiv(columns, 8), G):
        units = first + tl.arange(0, G)
        exists = (rows < d_out)[:, None] & (units * 8 < columns)[None, :]
        e0, e1, e2, e3, e4, e5, e6, e7 = _entries(
            values, scale, mask, starts, offsets, rows[:, None], units[None, :], exists,
            mask_stride, offsets_stride, LAYOUT, N, BITS, GROUP, ALIGNED,
        )  # fmt: skip
        k = units[:, None] * 8 + tl.arange(0, 8)[None, :]  # [G, 8]
        inside = (tokens < n)[:, None, None] & (k < columns)[None]
        inputs = tl.load(x + tokens[:, None, None] * columns + k[None], inside, other=0.0)
        x0, x1, x2, x3, x4, x5, x6, x7 = split_eight(inputs)  # each [T, G]
        acc += e0.to(tl.float32)[None] * x0.to(tl.float32)[:, None, :]
        acc += e1.to(tl.float32)[None] * x1.to(tl.float32)[:, None, :]
        acc += e2.to(tl.float32)[None] * x2.to(tl.float32)[:, None, :]
        acc += e3.to(tl.float32)[None] * x3.to(tl.float32)[:, None, :]
        acc += e4.to(tl.float32)[None] * x4.to(tl.float32)[:, None, :]
        acc += e5.to(tl.float32)[None] * x5.to(tl.float32)[:, None, :]
        acc += e6.to(tl.float32)[None] * x6.to(tl.float32)[:, None, :]
        acc += e7.to(tl.float32)[None] * x7.to(tl.float32)[:, None, :]
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
    T: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    tokens = tl.arange(0, T)
    acc = tl.zeros([R, T], tl.float32)
    for first in range(0, tl.cdiv(columns, 8), G):
        units = first + tl.arange(0, G)
        exists = (rows < d_out)[:, None] & (units * 8 < columns)[None, :]
        e0, e1, e2, e3, e4, e5, e6, e7 = _entries(
            values, scale, mask, starts, offsets, rows[:, None], units[None, :], exists,
            mask_stride, offsets_stride, LAYOUT, N, BITS, GROUP, ALIGNED,
        )  # fmt: skip
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
    R: tl.constexpr,
    G: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    units = tl.program_id(1) * G + tl.arange(0, G)
    exists = (rows < d_out)[:, None] & (units * 8 < columns)[None, :]
    e0, e1, e2, e3, e4, e5, e6, e7 = _entries(
        values, scale, mask, starts, offsets, rows[:, None], units[None, :], exists,
        mask_stride, offsets_stride, LAYOUT, N, BITS, GROUP, ALIGNED,
    )  # fmt: skip
    k = units[:, None] * 8 + tl.arange(0, 8)[None, :]  # [G, 8]
    to = W + rows[:, None, None].to(tl.int64) * columns + k[None]
    joined = join_eight(e0, e1, e2, e3, e4, e5, e6, e7)  # [R, G, 8]
    tl.store(to, joined, (rows < d_out)[:, None, None] & (k < columns)[None])
