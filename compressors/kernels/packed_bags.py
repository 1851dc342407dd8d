"""Products with packed integers on the CPU, with weighted sums of quantized embedding rows.

The embedding bag of FBGEMM, part of torch on x86, adds quantized rows times float32 weights. Rows
of the transposed matrix as embeddings and the input as weights make it a matrix-vector product
that reads 2, 4 or 8 bits a number and computes in float32. A bag is a group of inputs that share a
scale, so that scales are applied to sums of a group, not to every number.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.kernels.implementations import Entry, Layout, Need

BAG_ROWS = 8
"""Largest number of input rows for bags. Unpacking once is faster for more: with 4 bits
[4096, 4096] and float32, 1.9 against 1.1 times the speed of a dense layer for 4 rows, 1.0 against
1.2 for 16."""
PARTS = 8
"""Bags per row of the input if the whole row has one scale: something to do for every thread."""
CHUNK = 1 << 18
"""Numbers that are unpacked at a time: 1 MiB in float32, so that they stay in the cache."""
TABLE_WIDTH = 8192
"""Largest number of outputs in one table: partial sums and unpacked numbers of a whole vocabulary
would not fit into the cache."""
SMALLEST_GROUP = 8
"""Smaller groups write as many bytes of partial sums as they read codes."""

Q: Any = torch.ops.quantized
BAGS = {
    1: lambda: Q.embedding_bag_byte_rowwise_offsets,
    2: lambda: Q.embedding_bag_4bit_rowwise_offsets,
    4: lambda: Q.embedding_bag_2bit_rowwise_offsets,
}
UNPACK = {
    1: lambda: Q.embedding_bag_byte_unpack,
    2: lambda: Q.embedding_bag_4bit_unpack,
    4: lambda: Q.embedding_bag_2bit_unpack,
}


def per_byte(bits: int) -> int:
    """Return how many codes of `bits` bits are stored in a byte: 1, 2 or 4."""
    return 4 if bits == 2 else 2 if bits <= 4 else 1


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Convert a quantized matrix.

    Parameters
    ----------
    codes : Tensor, shape [d_out, d_in], int8
    scale : Tensor, shape [d_out, groups]
    zero : Tensor, shape [d_out, groups], int8, or None
        Codes that represent 0.
    bits : int

    Returns
    -------
    dict of str to Tensor
        ``codes`` [tables, d_in, bytes], each row followed by a factor of 1 and the smallest code,
        as embedding bags expect; ``scale`` [groups, d_out], float32, and, for zero points, their
        products with the scales, ``shift`` [groups, d_out].
    """
    d_out, d_in = codes.shape
    each, offset = per_byte(bits), 1 << (bits - 1)
    tables, width = _tables(d_out, each)
    tail = _row_parameters(bits)
    packed = codes.new_empty(tables, d_in, width + len(tail), dtype=torch.uint8)
    packed[:, :, width:] = tail
    for table, n in enumerate(range(0, d_out, width * each)):
        rows = codes[n : n + width * each].view(torch.uint8) + offset
        part = rows.new_zeros(d_in, width * each)
        part[:, : len(rows)] = rows.T
        part = part.view(d_in, width, each)
        for place in range(1, each):
            part[:, :, 0] |= part[:, :, place] << (8 // each * place)
        packed[table, :, :width] = part[:, :, 0]
    tensors = {"codes": packed, "scale": scale.detach().T.float().contiguous()}
    if zero is not None:
        tensors["shift"] = tensors["scale"] * zero.T
    return tensors


def unpack(
    tensors: dict[str, Tensor], bits: int, shape: tuple[int, int], ids: Tensor | None = None
) -> Tensor:
    """Return the int8 codes [d_out, d_in] that `pack` converted, or those of the rows `ids`."""
    each, offset = per_byte(bits), 1 << (bits - 1)
    _, width = _tables(shape[0], each)
    stored = tensors["codes"].transpose(1, 2)  # [tables, bytes, d_in]
    if ids is None:
        found = stored[:, :width, None].expand(-1, -1, each, -1).flatten(0, 2)[: shape[0]]
        ids = torch.arange(shape[0], device=found.device)
    else:
        found = stored[ids // (width * each), ids // each % width]  # [n, d_in]
    if each > 1:
        bits_each = 8 // each
        found = (found >> (ids % each * bits_each).to(torch.uint8)[:, None]) & (
            (1 << bits_each) - 1
        )
    return (found - offset).contiguous().view(torch.int8)


def multiply(x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bits: int) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out], in the dtype of `x` and computed in float32.

    Parameters
    ----------
    x : Tensor, shape [rows, d_in]
    codes, scale, shift : Tensor
        As returned by `pack`.
    bits : int
    """
    exact, each = x.float().contiguous(), per_byte(bits)
    product = _sum_bags if len(x) <= BAG_ROWS else _unpacked_product
    if len(codes) == 1:
        y = product(exact, codes[0], scale, each)
    else:
        y = exact.new_empty(len(x), scale.shape[1])
        _, width = _tables(scale.shape[1], each)
        for table, n in enumerate(range(0, scale.shape[1], width * each)):
            part = slice(n, n + width * each)
            y[:, part] = product(exact, codes[table], scale[:, part], each)
    if shift is not None:
        y = torch.addmm(y, exact.unflatten(1, (len(shift), -1)).sum(2), shift, alpha=-1)
    return y.to(x.dtype)


def _sum_bags(x: Tensor, codes: Tensor, scale: Tensor, each: int) -> Tensor:
    (rows, d_in), (groups, d_out) = x.shape, scale.shape
    bags = groups if groups > 1 else min(PARTS, d_in)
    index, offsets = _bags(d_in, bags)
    index, offsets = index[: rows * d_in], offsets[: rows * bags]
    sums = BAGS[each]()(codes, index, offsets, per_sample_weights=x.view(-1))
    sums = sums.view(rows, bags, -1)[:, :, :d_out]  # [rows, bags, d_out]
    y: Tensor = sums.mul_(scale).sum(1) if groups > 1 else sums.sum(1).mul_(scale)
    return y


def _unpacked_product(x: Tensor, codes: Tensor, scale: Tensor, each: int) -> Tensor:
    (rows, d_in), (groups, d_out) = x.shape, scale.shape
    size, step = d_in // groups, max(64, CHUNK // d_out)
    if groups > 1:
        step = max(1, step // size) * size
    y = x.new_zeros(rows, d_out)
    for k in range(0, d_in, step):
        part = UNPACK[each]()(codes[k : k + step])[:, :d_out]  # [step, d_out]
        if groups > 1:
            factors = scale[k // size : (k + step) // size, None]
            part.unflatten(0, (-1, size)).mul_(factors)
        y.addmm_(x[:, k : k + step], part)
    return y if groups > 1 else y.mul_(scale)


def _tables(d_out: int, each: int) -> tuple[int, int]:
    """Return the number of tables that hold the outputs, and the bytes of codes of their rows."""
    tables = -(-d_out // TABLE_WIDTH)
    return tables, -(-d_out // (tables * each))


@cache
def _bags(d_in: int, bags: int) -> tuple[Tensor, Tensor]:
    """Return the positions of all inputs of all rows, and the first one of every bag."""
    size = -(-d_in // bags)
    index = torch.arange(d_in, dtype=torch.int32).repeat(BAG_ROWS)
    first = (torch.arange(bags, dtype=torch.int32) * size).clamp(max=d_in)
    starts = torch.arange(BAG_ROWS, dtype=torch.int32)[:, None] * d_in
    return index, (first + starts).flatten()


def _row_parameters(bits: int) -> Tensor:
    """Return the bytes of the factor and the smallest value that follow every row."""
    dtype = torch.float32 if per_byte(bits) == 1 else torch.float16
    return torch.tensor([1.0, -float(1 << (bits - 1))], dtype=dtype).view(torch.uint8)


def refuse(need: Need) -> str | None:
    """Return why FBGEMM does not serve a product; None if it does."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs a processor with AVX2"
    if need.group_size is not None and need.group_size < SMALLEST_GROUP:
        return f"groups of fewer than {SMALLEST_GROUP}"
    return None


@torch.library.custom_op("lrc::packed_bags", mutates_args=())
def packed_bags(x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bits: int) -> Tensor:
    """Return ``x @ W.T`` as `multiply` does."""
    return multiply(x, codes, scale, shift, bits)


@packed_bags.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[1])


def run(x: Tensor, tensors: dict[str, Tensor], bits: int, d_out: int) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] for the tensors that `pack` returned."""
    product = packed_bags if torch.compiler.is_compiling() else multiply
    y: Tensor = product(x, tensors["codes"], tensors["scale"], tensors.get("shift"), bits)
    return y


ENTRIES = [
    Entry(
        "embedding bags (FBGEMM)",
        "packed_linear",
        "cpu",
        range(2, 9),
        run,
        refuse=refuse,
        layout=Layout(pack, unpack),
    )
]
