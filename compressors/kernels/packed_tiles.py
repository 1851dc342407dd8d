"""Products with packed integers on the CPU, in bfloat16: torch's int4 kernel.

The kernel multiplies by ``(code - 8) * scale + zero`` with codes of 4 bits, groups of 32 to 256
inputs and sums in float32. Codes of fewer bits are stored as 4. Codes of 5 to 8 bits are
``16 * high + low``: one matrix with twice as many inputs, multiplied by the input twice.
"""

import torch
from torch import Tensor, nn

from lrc.compressors.kernels.implementations import Entry, Layout, Need
from lrc.compressors.kernels.scratch import scratch

GROUPS = (256, 128, 64, 32)
"""Group sizes of the kernel."""
KERNEL_ROWS = 64
"""Largest number of input rows for the kernel; more are multiplied after unpacking."""
CHUNK = 1 << 18
"""Numbers that are unpacked at a time, so that they stay in the cache."""
HALF = 8
"""Code of zero in the kernel."""


def tile() -> int:
    """Return the number of outputs whose codes torch interleaves."""
    return 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def kernel_group(d_in: int, groups: int) -> int | None:
    """Return the largest group size of the kernel that divides a group; None if there is none."""
    return next((size for size in GROUPS if d_in // groups % size == 0), None)


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Convert a quantized matrix.

    Parameters
    ----------
    codes : Tensor, shape [d_out, d_in], int8
    scale : Tensor, shape [d_out, groups], bfloat16
    zero : Tensor, shape [d_out, groups], int8, or None
        Codes that represent 0.
    bits : int

    Returns
    -------
    dict of str to Tensor
        ``codes`` [tiles, planes * d_in, tile / 2], uint8: byte j of a tile holds outputs j and
        j + tile / 2; ``scale`` [planes * kernel groups, outputs, 2] with scales and zeros; for
        zero points ``shift`` [groups, d_out]: what rounding the zeros to bfloat16 removed.
    """
    d_out, d_in = codes.shape
    height, size = tile(), kernel_group(d_in, scale.shape[1])
    assert size is not None
    planes, half = 1 if bits <= 4 else 2, height // 2
    tiles = codes.new_empty(-(-d_out // height), planes * d_in, half, dtype=torch.uint8)
    step = max(1, CHUNK // (d_in * height)) * height
    for n in range(0, d_out, step):
        part = codes[n : n + step].int()
        both = [part + HALF] if planes == 1 else [(part >> 4) + HALF, part & 0xF]
        whole = torch.cat(both, dim=1)
        whole = nn.functional.pad(whole, (0, 0, 0, -len(whole) % height), value=HALF)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 2)
        tiles[n // height : (n + step) // height] = packed.view(-1, whole.shape[1], half)
    scales = scale.detach().T.repeat_interleave(d_in // scale.shape[1] // size, dim=0)
    scales = nn.functional.pad(scales, (0, -d_out % height))
    zeros = torch.zeros_like(scales)
    tensors = {}
    if zero is not None:
        exact = -scale.detach().T.float() * zero.T  # [groups, d_out]
        rounded = exact.to(scale.dtype)
        tensors["shift"] = (exact - rounded).to(scale.dtype)
        repeated = rounded.repeat_interleave(len(scales) // len(exact), dim=0)
        zeros[:, :d_out] = repeated
    pairs = torch.stack([scales, zeros], dim=-1)
    if bits > 4:  # both factors are powers of two, so that nothing is rounded
        low = torch.stack([scales, scales * HALF], dim=-1)
        pairs = torch.cat([torch.stack([scales * 16, zeros], dim=-1), low])
    return {"codes": tiles, "scale": pairs.contiguous(), **tensors}


def unpack(
    tensors: dict[str, Tensor], bits: int, shape: tuple[int, int], ids: Tensor | None = None
) -> Tensor:
    """Return the int8 codes [d_out, d_in] that `pack` converted, or those of the rows `ids`."""
    packed = tensors["codes"]  # [tiles, planes * d_in, tile / 2]
    if ids is None:
        both = torch.stack([packed & 0xF, packed >> 4], dim=1)  # [tiles, 2, planes * d_in, half]
        stored = both.transpose(2, 3).flatten(0, 2)[: shape[0]]  # [d_out, planes * d_in]
    else:
        half = packed.shape[2]
        tiles, places = ids // (2 * half), ids % (2 * half)
        found = packed[tiles, :, places % half]  # [n, planes * d_in]
        stored = (found >> (4 * (places // half)).to(torch.uint8)[:, None]) & 0xF
    if bits <= 4:
        return (stored - HALF).view(torch.int8)
    high, low = stored.chunk(2, dim=1)
    return (((high - HALF) << 4) | low).view(torch.int8)


def multiply(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bits: int, d_out: int
) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out].

    Parameters
    ----------
    x : Tensor, shape [rows, d_in], bfloat16
    codes, scale, shift : Tensor
        As returned by `pack`.
    bits, d_out : int
    """
    if len(x) <= KERNEL_ROWS:
        whole = x.contiguous() if bits <= 4 else torch.cat([x, x], dim=1)
        # torch reads the tiles as rows of outputs.
        flat = codes.view(-1, codes.shape[1] // 2)
        size = whole.shape[1] // len(scale)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(whole, flat, size, scale)
        y = y[:, :d_out]
    else:
        y = _unpacked_product(x, codes, scale, bits, shift is not None)[:, :d_out]
    if shift is not None:
        y = torch.addmm(y, x.unflatten(1, (len(shift), -1)).sum(2), shift)
    return y


def _unpacked_product(x: Tensor, codes: Tensor, scale: Tensor, bits: int, shifted: bool) -> Tensor:
    tiles, _, half = codes.shape
    (rows, d_in), planes = x.shape, 1 if bits <= 4 else 2
    size = planes * d_in // len(scale)
    factors = scale[-(d_in // size) :, :, 0]  # [groups, outputs]; the lowest plane is not scaled
    zeros = scale[: d_in // size, :, 1]
    y = x.new_empty(rows, tiles * 2 * half)
    step = max(1, CHUNK // (d_in * 2 * half))
    for n in range(0, tiles, step):
        part = codes[n : n + step]  # [step, planes * d_in, half]
        halves = scratch("codes", (2, *part.shape), torch.uint8)
        torch.bitwise_and(part, 0xF, out=halves[0])
        torch.bitwise_right_shift(part, 4, out=halves[1])
        signed = halves[:, :, :d_in].sub_(HALF)  # [2, step, d_in, half]
        if planes == 2:
            signed.bitwise_left_shift_(4).bitwise_or_(halves[:, :, d_in:])
        matrix = scratch("matrix", (d_in, len(part) * 2 * half), x.dtype)
        tiled = matrix.view(d_in, len(part), 2, half).permute(2, 1, 0, 3)
        tiled.copy_(signed.view(torch.int8))
        outputs = slice(n * 2 * half, (n + step) * 2 * half)
        grouped = matrix.unflatten(0, (-1, size))  # [groups, size, outputs]
        grouped.mul_(factors[:, None, outputs].contiguous())
        if shifted:
            grouped.add_(zeros[:, None, outputs].contiguous())
        product = scratch("product", (rows, matrix.shape[1]), x.dtype)
        y[:, outputs] = torch.mm(x, matrix, out=product)
    return y


def refuse(need: Need) -> str | None:
    """Return why torch's int4 kernel does not serve a product; None if it does."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs a processor with AVX2"
    if kernel_group(need.shape[1], need.shape[1] // (need.group_size or need.shape[1])) is None:
        return "needs groups that are multiples of 32"
    return None


@torch.library.custom_op("lrc::packed_tiles", mutates_args=())
def packed_tiles(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bits: int, d_out: int
) -> Tensor:
    """Return ``x @ W.T`` as `multiply` does."""
    return multiply(x, codes, scale, shift, bits, d_out).contiguous()


@packed_tiles.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, bits: int, d_out: int
) -> Tensor:
    return x.new_empty(x.shape[0], d_out)


def run(x: Tensor, tensors: dict[str, Tensor], bits: int, d_out: int) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] for the tensors that `pack` returned."""
    product = packed_tiles if torch.compiler.is_compiling() else multiply
    codes, shift = tensors["codes"], tensors.get("shift")
    y: Tensor = product(x, codes, tensors["scale"], shift, bits, d_out)
    return y


ENTRIES = [
    Entry(
        "int4 (torch)",
        "packed_linear",
        "cpu",
        range(2, 9),
        run,
        dtypes=[torch.bfloat16],
        refuse=refuse,
        layout=Layout(pack, unpack),
    )
]
