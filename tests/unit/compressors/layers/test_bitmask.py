"""Masks with one bit per entry: nothing is lost, and the bytes are those of the format."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lrc.compressors.layers.bitmask import (
    mask_problems,
    pack_bits,
    packed_width,
    scatter_values,
    unpack_bits,
)

WIDTHS = range(1, 21)


def random_mask(rows: int, n: int) -> Tensor:
    return torch.rand(rows, n, generator=torch.Generator().manual_seed(n)) < 0.5


@pytest.mark.parametrize("n", WIDTHS)
def test_unpacking_inverts_packing(n: int) -> None:
    for mask in (
        random_mask(7, n),
        torch.zeros(7, n, dtype=torch.bool),
        torch.ones(7, n, dtype=torch.bool),
        random_mask(n, 7).T,  # not contiguous
    ):
        before = mask.clone()
        packed = pack_bits(mask)
        assert packed.dtype == torch.uint8
        assert packed.shape == (len(mask), packed_width(n))
        assert torch.equal(unpack_bits(packed, n), before)
        assert torch.equal(mask, before)


@pytest.mark.parametrize("n", WIDTHS)
def test_bytes_are_those_of_numpy_with_the_lowest_bit_first(n: int) -> None:
    mask = random_mask(7, n)
    expected = np.packbits(mask.numpy(), axis=1, bitorder="little")
    assert pack_bits(mask).tolist() == expected.tolist()


def test_bytes_of_a_known_mask() -> None:
    columns = [0, 1, 7, 8, 10]  # of 11: 1 + 2 + 128, and 1 + 4
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, columns] = True
    assert pack_bits(mask).tolist() == [[131, 5], [0, 0]]


@pytest.mark.parametrize("n", WIDTHS)
def test_padding_is_zero_and_is_not_read(n: int) -> None:
    ones = torch.ones(3, n, dtype=torch.bool)
    packed = pack_bits(ones)
    assert packed[:, :-1].eq(255).all()
    assert packed[:, -1].eq(2 ** ((n - 1) % 8 + 1) - 1).all()
    assert torch.equal(unpack_bits(torch.full_like(packed, 255), n), ones)


def test_values_are_scattered_row_by_row() -> None:
    mask = random_mask(5, 11)
    values = torch.arange(1.0, int(mask.sum()) + 1)
    found = scatter_values(values, pack_bits(mask), 11)
    assert torch.equal(found[mask], values)
    assert not found[~mask].any()


@pytest.mark.parametrize("n", WIDTHS)
def test_only_masks_with_the_right_bits_are_consistent(n: int) -> None:
    packed = pack_bits(torch.ones(3, n, dtype=torch.bool))
    assert mask_problems(packed, n, 3 * n) == []
    for count in (3 * n - 1, 3 * n + 1):
        problem = f"the mask has {3 * n} bits set, expected {count}"
        assert mask_problems(packed, n, count) == [problem]
    if n % 8:
        packed[1, -1] |= 128
        assert mask_problems(packed, n, 3 * n + 1) == [f"the mask has bits set after column {n}"]
