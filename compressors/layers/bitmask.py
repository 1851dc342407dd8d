"""Boolean masks stored with one bit per entry."""

import torch
from torch import Tensor

BYTE = 8


def packed_width(n: int) -> int:
    """Return the number of bytes that a row of `n` bits takes."""
    return -(-n // BYTE)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask [rows, n] into bytes [rows, packed_width(n)]: bit j of byte i is column 8 i + j.

    Bits after the last column are zero.
    """
    rows, n = mask.shape
    padded = mask.new_zeros(rows, packed_width(n) * BYTE)
    padded[:, :n] = mask
    places = torch.arange(BYTE, device=mask.device, dtype=torch.uint8)
    bits = padded.view(rows, -1, BYTE).to(torch.uint8) << places
    return bits.sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """Return the mask [rows, n] that `pack_bits` packed."""
    places = torch.arange(BYTE, device=packed.device, dtype=torch.uint8)
    bits = (packed[:, :, None] >> places) & 1  # [rows, bytes, 8]
    return bits.flatten(1)[:, :n].bool()


def scatter_values(values: Tensor, packed: Tensor, n: int, size: int = 1) -> Tensor:
    """Place `values`, in order, row by row where the mask [rows, n] is set; zeros elsewhere.

    With a `size`, every bit stands for so many numbers. Returns [rows, n * size].
    """
    mask = unpack_bits(packed, n)
    whole = values.new_zeros(*mask.shape, size)
    return whole.masked_scatter(mask[:, :, None], values).flatten(1)


def mask_problems(
    packed: Tensor, n: int, count: int, *, per_row: int | None = None, pattern: str | None = None
) -> list[str]:
    """Return what is wrong with a packed mask [rows, n]; empty if it is consistent.

    Parameters
    ----------
    packed : Tensor, shape [rows, packed_width(n)]
    n : int
        Number of columns.
    count : int
        Number of set bits.
    per_row : int, optional
        Number of set bits of every row, if all have equally many.
    pattern : str, optional
        ``2:4`` if exactly two of every four consecutive bits are set; other numbers likewise.
    """
    bits = unpack_bits(packed, packed.shape[1] * BYTE)
    if bool(bits[:, n:].any()):
        return [f"the mask has bits set after column {n}"]
    found = int(bits.sum())
    if found != count:
        return [f"the mask has {found} bits set, expected {count}"]
    if pattern is not None:
        kept, size = map(int, pattern.split(":"))
        if bool((bits[:, :n].unflatten(1, (-1, size)).sum(dim=2) != kept).any()):
            return [f"the mask does not have {kept} bits in every {size} columns"]
    if per_row is not None and bool((bits.sum(dim=1) != per_row).any()):
        return [f"the mask does not have {per_row} bits in every row"]
    return []
