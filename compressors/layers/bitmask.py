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


def scatter_values(values: Tensor, packed: Tensor, n: int) -> Tensor:
    """Place `values` [count] row by row where the mask [rows, n] is set, zeros elsewhere."""
    mask = unpack_bits(packed, n)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def mask_problem(packed: Tensor, n: int, count: int) -> str | None:
    """Return what is wrong with a packed mask of `count` set bits; None if it is consistent."""
    bits = unpack_bits(packed, packed.shape[1] * BYTE)
    if bool(bits[:, n:].any()):
        return f"the mask has bits set after column {n}"
    found = int(bits.sum())
    return None if found == count else f"the mask has {found} bits set, expected {count}"
