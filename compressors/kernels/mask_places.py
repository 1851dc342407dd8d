"""Where the values of sparse rows belong: the index arithmetic of the kernels, in PyTorch."""

import torch
from torch import Tensor

UNIT = 8
"""Columns that a byte of the mask describes."""
BLOCK = 64
"""Columns for which kernels look up an offset instead of counting bits from the start of the row.
An int16 for 64 columns adds 2.8 % to 16-bit values at density 0.5."""


def bits_of_bytes() -> Tensor:
    """Return the bits of all bytes [256, 8], lowest first."""
    return (torch.arange(256)[:, None] >> torch.arange(UNIT)) & 1


def places_of(n: int) -> Tensor:
    """Return for all bytes the places of their first n bits [256, n]; 7 where there are fewer."""
    bits = bits_of_bytes().bool()
    order = torch.where(bits, torch.arange(UNIT), UNIT).sort(dim=1).values
    return order[:, :n].clamp(max=UNIT - 1)


def selectors(n: int) -> Tensor:
    """Return selectors of byte permutations for the pattern n:8, [256, words] int32.

    The eight inputs of a unit are 16-bit numbers in four registers of 32 bits. Values 2 j and
    2 j + 1 need inputs from registers j to ``last(n, j)``, see `span`. A selector has four bits for
    each byte of the result: the number of one of the eight bytes of two registers.

    A span of two registers needs one selector for both. One of three needs a selector for the first
    two registers, and one for the result and the third, in the upper 16 bits. One of four applies
    the first selector to both halves, and the second one to the two results. With n of 6 or more
    all spans are at most two, and 16 bits a pair are stored.
    """
    places = places_of(n)
    fields = []
    for j in range((n + 1) // 2):
        first, last = span(n, j)
        pair = places[:, [2 * j, min(2 * j + 1, n - 1)]]  # [256, 2]
        distance = (pair - 2 * first).clamp(0, UNIT - 1)
        # Which of the four 16-bit numbers of two registers, or of the second result.
        lower = _selector(distance & 3)
        half = torch.arange(2)
        if last - first == 2:  # the third register holds 4 and 5
            upper = _selector(torch.where(distance < 4, half, 2 + (distance & 1)))
        else:
            upper = _selector(torch.where(distance < 4, half, 2 + half))
        fields.append(lower if n >= 6 else lower | upper << 16)
    if n >= 6:
        fields += [torch.zeros_like(fields[0])] * (4 - len(fields))
        fields = [fields[0] | fields[1] << 16, fields[2] | fields[3] << 16]
    elif n == 5:
        fields.append(torch.zeros_like(fields[0]))
    words = torch.stack(fields, dim=1)  # [256, words] int64
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def span(n: int, j: int) -> tuple[int, int]:
    """Return the first and the last register that inputs of values 2 j and 2 j + 1 can be in."""
    return j, min(3, (2 * j + 9 - n) // 2)


def _selector(numbers: Tensor) -> Tensor:
    """Return the selector [rows] for two 16-bit numbers [rows, 2] out of four."""
    low, high = 2 * numbers[:, 0], 2 * numbers[:, 1]
    return low | (low + 1) << 4 | high << 8 | (high + 1) << 12


def starts_and_offsets(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the values of rows and of their blocks start.

    Parameters
    ----------
    mask : Tensor, shape [d_out, bytes], uint8
        A bit for every column, or for every group of columns.

    Returns
    -------
    starts : Tensor, shape [d_out], int32
        Number of bits set in all rows before.
    offsets : Tensor, shape [d_out, ceil(bytes / 8)], int16 or int32
        Number of bits set in the row before each block of 64; int16 where it can hold them.
    """
    counts = bits_of_bytes().sum(dim=1, dtype=torch.uint8).to(mask.device)
    each = counts[mask.int()]  # [d_out, bytes] uint8
    padded = torch.nn.functional.pad(each, (0, -each.shape[1] % UNIT))
    blocks = padded.view(len(mask), -1, UNIT).sum(dim=2)  # [d_out, blocks]
    offsets = blocks.cumsum(dim=1) - blocks
    totals = blocks.sum(dim=1)
    small = mask.shape[1] * UNIT <= torch.iinfo(torch.int16).max
    starts = totals.cumsum(dim=0) - totals
    return starts.to(torch.int32), offsets.to(torch.int16 if small else torch.int32)
