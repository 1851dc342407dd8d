"""The index arithmetic of the kernels for sparse matrices, without the kernels."""

from itertools import combinations

import pytest
import torch
from scipy.sparse import csr_matrix

from lrc.compressors.kernels.mask_places import places_of, selectors, span, starts_and_offsets
from lrc.compressors.kernels.masked_csr import find_places
from lrc.compressors.layers.bitmask import pack_bits


def permute_bytes(a: int, b: int, selector: int) -> int:
    """Do what the instruction does: byte i of the result is one of the eight of a and b."""
    both = (b << 32) | a
    return sum((both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def chosen(n: int, byte: int, inputs: list[int]) -> list[int]:
    """Return the inputs that the selectors choose for n values, as the kernel applies them."""
    registers = [inputs[2 * i] | inputs[2 * i + 1] << 16 for i in range(4)]
    words = [int(word) & 0xFFFFFFFF for word in selectors(n)[byte]]
    fields = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
    found = []
    for j in range((n + 1) // 2):
        first, last = span(n, j)
        parts = registers[first : last + 1]
        lower, upper = (fields[j], 0) if n >= 6 else fields[2 * j : 2 * j + 2]
        pair = permute_bytes(parts[0], parts[min(1, last - first)], lower)
        if len(parts) == 3:
            pair = permute_bytes(pair, parts[2], upper)
        elif len(parts) == 4:
            pair = permute_bytes(pair, permute_bytes(parts[2], parts[3], lower), upper)
        found += [pair & 0xFFFF, pair >> 16]
    return found[:n]


@pytest.mark.parametrize("n", range(1, 8))
def test_selectors_choose_the_inputs_of_the_places_for_all_masks(n):
    inputs = [0x1F00 + 37 * i for i in range(8)]
    for places in combinations(range(8), n):
        byte = sum(1 << place for place in places)
        assert chosen(n, byte, inputs) == [inputs[place] for place in places]


def test_selectors_of_all_n_are_one_two_or_four_words():
    assert [selectors(n).shape[1] for n in range(1, 8)] == [1, 1, 2, 2, 4, 2, 2]


def test_places_are_those_of_the_bits_in_ascending_order():
    assert places_of(3)[0b10010010].tolist() == [1, 4, 7]
    assert places_of(2)[0b1].tolist() == [0, 7]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 64), (3, 65), (7, 300)])
def test_starts_and_offsets_count_the_bits_before(rows, columns):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.6
    starts, offsets = starts_and_offsets(pack_bits(mask))
    assert offsets.shape == (rows, -(-columns // 64))
    for row in range(rows):
        assert starts[row] == mask[:row].sum()
        for block in range(offsets.shape[1]):
            assert offsets[row, block] == mask[row, : 64 * block].sum()


def test_offsets_of_wide_rows_have_32_bits():
    mask = torch.full((1, 2**12 + 8), 255, dtype=torch.uint8)
    _, offsets = starts_and_offsets(mask)
    assert offsets.dtype == torch.int32
    assert offsets[0, -1] == 2**15
    assert starts_and_offsets(mask[:, : 2**12 - 8])[1].dtype == torch.int16


def test_compressed_rows_are_those_of_scipy():
    mask = torch.rand(6, 27, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[2] = False
    places = find_places(pack_bits(mask), 27)
    expected = csr_matrix(mask.numpy())
    assert places["starts"].tolist() == expected.indptr.tolist()
    assert places["offsets"].tolist() == expected.indices.tolist()
