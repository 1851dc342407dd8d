"""Triton kernels for products that write their rows in the order of the outputs."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 4 * 132
"""Programs that keep an H100 or H200 of 132 multiprocessors busy with reading."""
TENSOR_CORE_ROWS = 16
"""Smallest number of rows that tensor cores multiply."""
PLACE_TOKENS, PLACE_COLUMNS = 4, 512
MOST_TOKENS = 65535 * PLACE_TOKENS
"""Tokens of a launch of `interleave`: the second dimension of a grid has at most 65,535 blocks."""


class Blocks(NamedTuple):
    """Numbers of rows and columns of the matrix that a program reads at once."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3


def few_rows(p: Tensor, c: Tensor, inverse: Tensor | None, blocks: Blocks | None = None) -> Tensor:
    """Multiply 1 to 16 inputs by a matrix, of which every number is read once.

    Parameters
    ----------
    p : Tensor, shape [n, rank]
        Contiguous within a row.
    c : Tensor, shape [others, rank]
        Contiguous.
    inverse : Tensor, shape [rank + others], int32, optional
        Column of the result for every column of ``cat([p, p @ c.T], -1)``. Without it the result is
        ``p @ c.T``.
    blocks : Blocks, optional
        Tuning; by default chosen by the shape.

    Returns
    -------
    Tensor, shape [n, rank + others] or [n, others]
    """
    n, rank = p.shape
    others = len(c)
    copied = 0 if inverse is None else rank
    y = p.new_empty(n, copied + others)
    rows, columns, warps, stages = blocks or _blocks(n, others, rank)
    grid = triton.cdiv(others, rows) + triton.cdiv(copied, rows * columns)
    _few_rows[(grid,)](
        p,
        c,
        y if inverse is None else inverse,
        y,
        n,
        rank,
        others,
        p.stride(0),
        y.stride(0),
        PLACED=inverse is not None,
        TOKENS=1 if n == 1 else TENSOR_CORE_ROWS,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def interleave(p: Tensor, others: Tensor, order: Tensor) -> Tensor:
    """Return ``cat([p, others], -1)[:, order]``; both are contiguous within a row."""
    n, rank = p.shape
    y = p.new_empty(n, len(order))
    for first in range(0, n, MOST_TOKENS):
        tokens = min(n - first, MOST_TOKENS)
        grid = (triton.cdiv(len(order), PLACE_COLUMNS), triton.cdiv(tokens, PLACE_TOKENS))
        _interleave[grid](
            p[first:],
            others[first:],
            order,
            y[first:],
            tokens,
            rank,
            len(order),
            p.stride(0),
            others.stride(0),
            y.stride(0),
            TOKENS=PLACE_TOKENS,
            COLUMNS=PLACE_COLUMNS,
        )
    return y


def _blocks(n: int, others: int, rank: int) -> Blocks:
    """Return blocks that are large, but leave enough programs."""
    columns = min(512, max(16, triton.next_power_of_2(rank)))
    if n > 1:
        return Blocks(TENSOR_CORE_ROWS, min(columns, 256))
    rows = 16
    while rows > 2 and triton.cdiv(others, rows) < PROGRAMS:
        rows //= 2
    return Blocks(rows, columns)


@triton.jit
def _few_rows(
    p,  # [n, rank]
    c,  # [others, rank]
    inverse,  # [rank + others]
    y,  # [n, rank + others] if PLACED, else [n, others]
    n,
    rank,
    others,
    p_stride,
    y_stride,
    PLACED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    products = tl.cdiv(others, ROWS)
    tokens = tl.arange(0, TOKENS)
    if program < products:
        rows = program * ROWS + tl.arange(0, ROWS)
        exists = rows < others
        start = c + rows[:, None].to(tl.int64) * rank
        if TOKENS == 1:
            sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for first in range(0, rank, COLUMNS):
                k = first + tl.arange(0, COLUMNS)
                W = tl.load(start + k[None, :], exists[:, None] & (k < rank)[None, :], other=0.0)
                x = tl.load(p + k, k < rank, other=0.0)
                sums += W.to(tl.float32) * x[None, :].to(tl.float32)
            out = tl.sum(sums, axis=1)[None, :]  # [1, ROWS]
        else:
            out = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
            x_start = p + tokens[:, None] * p_stride
            for first in range(0, rank, COLUMNS):
                k = first + tl.arange(0, COLUMNS)
                W = tl.load(start + k[None, :], exists[:, None] & (k < rank)[None, :], other=0.0)
                x = tl.load(
                    x_start + k[None, :], (tokens < n)[:, None] & (k < rank)[None, :], other=0.0
                )
                out = tl.dot(x, tl.trans(W), out, input_precision="ieee")
        places = rows
        if PLACED:
            places = tl.load(inverse + rank + rows, exists, other=0)
        tl.store(
            y + tokens[:, None] * y_stride + places[None, :],
            out.to(y.dtype.element_ty),
            (tokens < n)[:, None] & exists[None, :],
        )
    elif PLACED:  # copy the outputs of the pivot rows
        width: tl.constexpr = ROWS * COLUMNS
        j = (program - products) * width + tl.arange(0, width)
        targets = tl.load(inverse + j, j < rank, other=0)
        for token in range(n):
            copied = tl.load(p + token * p_stride + j, j < rank)
            tl.store(y + token * y_stride + targets, copied, j < rank)


@triton.jit
def _interleave(
    p,  # [n, rank]
    z,  # [n, d_out - rank]
    order,  # [d_out]
    y,  # [n, d_out]
    n,
    rank,
    d_out,
    p_stride,
    z_stride,
    y_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(order + columns, columns < d_out, other=0).to(tl.int32)[None, :]
    rows = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    exists = (rows < n) & (columns < d_out)[None, :]
    # Every number is in one of the two; the other load reads nothing.
    pivot, rest = source < rank, source >= rank
    mine = tl.load(p + rows * p_stride + source, exists & pivot, other=0.0)
    other = tl.load(z + rows * z_stride + source - rank, exists & rest, other=0.0)
    tl.store(y + rows * y_stride + columns[None, :], tl.where(pivot, mine, other), exists)
