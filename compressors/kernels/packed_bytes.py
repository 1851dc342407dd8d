"""Products with bytes and one scale per row on the CPU, in bfloat16: torch's int8 kernel."""

import torch
from torch import Tensor

from lrc.compressors.kernels.implementations import Entry, Layout, Need
from lrc.compressors.kernels.scratch import scratch

KERNEL_ROWS = 48
"""Largest number of input rows for the kernel; more are multiplied after conversion."""
COLUMNS = 32
"""The kernel reads whole registers, beyond the end of the matrix if rows are shorter."""
CHUNK = 1 << 18
"""Numbers that are converted at a time, so that they stay in the cache."""


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Return codes [d_out, d_in], int8, and ``scale`` [d_out]; the scales are shared."""
    assert zero is None
    return {"codes": codes.contiguous(), "scale": scale.detach().flatten().clone()}


def unpack(
    tensors: dict[str, Tensor], bits: int, shape: tuple[int, int], ids: Tensor | None = None
) -> Tensor:
    """Return the int8 codes [d_out, d_in], or those of the rows `ids`."""
    codes = tensors["codes"]
    return codes if ids is None else codes.index_select(0, ids)


def multiply(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out]; `x` is [rows, d_in]."""
    if len(x) <= KERNEL_ROWS:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scale)
        return y
    y = x.new_empty(len(x), len(codes))
    step = max(64, CHUNK // codes.shape[1])
    for n in range(0, len(codes), step):
        part = codes[n : n + step]
        matrix = scratch("matrix", part.shape, x.dtype).copy_(part).mul_(scale[n : n + step, None])
        product = scratch("product", (len(x), len(part)), x.dtype)
        y[:, n : n + step] = torch.mm(x, matrix.T, out=product)
    return y


def refuse(need: Need) -> str | None:
    """Return why torch's int8 kernel does not serve a product; None if it does."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs a processor with AVX2"
    if need.group_size not in (None, need.shape[1]) or not need.symmetric:
        return "needs symmetric codes with one scale per row"
    if need.shape[1] % COLUMNS:
        return f"needs a multiple of {COLUMNS} inputs"
    return None


@torch.library.custom_op("lrc::packed_bytes", mutates_args=())
def packed_bytes(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``x @ W.T`` as `multiply` does."""
    return multiply(x, codes, scale)


@packed_bytes.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def run(x: Tensor, tensors: dict[str, Tensor], bits: int, d_out: int) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] for the tensors that `pack` returned."""
    product = packed_bytes if torch.compiler.is_compiling() else multiply
    y: Tensor = product(x, tensors["codes"], tensors["scale"])
    return y


ENTRIES = [
    Entry(
        "int8 (torch)",
        "packed_linear",
        "cpu",
        range(5, 9),
        run,
        dtypes=[torch.bfloat16],
        refuse=refuse,
        layout=Layout(pack, unpack),
    )
]
