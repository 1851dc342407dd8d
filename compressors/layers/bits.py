"""Masks at one bit an entry."""

import torch
from torch import Tensor

PLACES = 8


def packed_width(n: int) -> int:
    """Return how many bytes a row of `n` bits takes."""
    return -(-n // PLACES)


def pack_bits(mask: Tensor) -> Tensor:
    """Write a mask [rows, n] as bytes [rows, packed_width(n)]: bit j of byte i is column 8 i + j.

    Columns beyond the last are zero.
    """
    rows, n = mask.shape
    padded = mask.new_zeros(rows, packed_width(n) * PLACES)
    padded[:, :n] = mask
    places = torch.arange(PLACES, device=mask.device, dtype=torch.uint8)
    bits = padded.view(rows, -1, PLACES).to(torch.uint8) << places
    return bits.sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """Read a mask [rows, n] back."""
    places = torch.arange(PLACES, device=packed.device, dtype=torch.uint8)
    bits = (packed[:, :, None] >> places) & 1  # [rows, bytes, 8]
    return bits.flatten(1)[:, :n].bool()


def spread(values: Tensor, packed: Tensor, n: int) -> Tensor:
    """Put `values` [count], row after row, where a mask [rows, n] says; zeros elsewhere."""
    mask = unpack_bits(packed, n)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
