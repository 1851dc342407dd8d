"""Products with packed integers on the CPU, in bfloat16: torch's int4 kernel.

The kernel multiplies by ``(code - 8) * scale + zero`` with codes of 4 bits, groups of 32 to 256
inputs and sums in float32. Codes of fewer bits are stored as 4. Codes of 5 to 8 bits are
``16 * high + low``: one matrix with twice as many inputs, multiplied by the input twice.
"""

import torch
from torch import Tensor, nn

from lrc.compressors.kernels.table import Entry, Layout, Need, register

GROUPS = (256, 128, 64, 32)
"""Group sizes of the kernel."""
KERNEL_ROWS = 64
"""Largest number of input rows for the kernel; more are multiplied after unpacking."""
CHUNK = 1 << 20
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
    tiles = []
    step = max(1, CHUNK // (d_in * height)) * height
    for n in range(0, d_out, step):
        part = codes[n : n + step].int()
        planes = [part + HALF] if bits <= 4 else [(part >> 4) + HALF, part & 0xF]
        whole = torch.cat(planes, dim=1)
        whole = nn.functional.pad(whole, (0, 0, 0, -len(whole) % height), value=HALF)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 2)
        tiles.append(packed.view(-1, whole.shape[1], height // 2))
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
    return {"codes": torch.cat(tiles), "scale": pairs.contiguous(), **tensors}


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
    return _signed(stored, bits, dim=1)


def _signed(stored: Tensor, bits: int, dim: int) -> Tensor:
    """Return int8 codes for uint8 codes as the kernel stores them, planes next to each other."""
    if bits <= 4:
        return (stored - HALF).view(torch.int8)
    high, low = stored.chunk(2, dim=dim)
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
        y = _unpacked_product(x, codes, scale, bits)[:, :d_out]
    if shift is not None:
        y = torch.addmm(y, x.unflatten(1, (len(shift), -1)).sum(2), shift)
    return y


def _unpacked_product(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    tiles, stored, half = codes.shape
    (rows, d_in), planes = x.shape, 1 if bits <= 4 else 2
    size = planes * d_in // len(scale)
    factors = scale[-(d_in // size) :, :, 0]  # [groups, outputs]; the lowest plane is not scaled
    zeros = scale[: d_in // size, :, 1]
    y = x.new_empty(rows, tiles * 2 * half)
    step = max(1, CHUNK // (d_in * 2 * half))
    for n in range(0, tiles, step):
        part = codes[n : n + step].transpose(0, 1)  # [planes * d_in, step, half]
        wide = part.new_empty(stored, part.shape[1], 2 * half)
        torch.bitwise_and(part, 0xF, out=wide[:, :, :half])
        torch.bitwise_right_shift(part, 4, out=wide[:, :, half:])
        outputs = slice(n * 2 * half, (n + step) * 2 * half)
        matrix = _signed(wide.flatten(1), bits, dim=0).to(x.dtype)  # [d_in, outputs]
        grouped = matrix.unflatten(0, (-1, size))
        grouped.mul_(factors[:, None, outputs]).add_(zeros[:, None, outputs])
        y[:, outputs] = x @ matrix
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


register(
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
)
