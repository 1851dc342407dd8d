"""Schemes: how they are written, and which tensors they take."""

import pytest
import torch

from lrc.compressors.layers.scheme import Scheme

WRITTEN = [
    f"int{bits}{group}{zero}"
    for bits in range(2, 9)
    for group in ("", "-g1", "-g64", "-g128")
    for zero in ("", "-asymmetric")
]


@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_read_is_written_alike(written):
    assert str(Scheme.read(written)) == written


def test_the_parts_of_a_scheme_are_read():
    assert Scheme.read("int8") == Scheme(8)
    assert Scheme.read("int4-g64") == Scheme(4, 64)
    assert Scheme.read("int3-g32-asymmetric") == Scheme(3, 32, symmetric=False)


@pytest.mark.parametrize(
    "written",
    ["", "int", "int44", "4", "int4-g0", "int4-g", "int4g64", "INT4", "int4-g64-", " int4"],
)
def test_what_is_no_scheme_is_refused(written):
    with pytest.raises(ValueError, match="must be written like"):
        Scheme.read(written)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits must be in \[2, 8\], got {bits}"):
        Scheme.read(f"int{bits}")
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        Scheme(4, 0)


def test_codes_are_signed():
    for bits in range(2, 9):
        scheme = Scheme(bits)
        assert scheme.highest - scheme.lowest == 2**bits - 1
        assert scheme.lowest + scheme.highest == -1


def test_groups_fill_the_rows():
    assert Scheme(4).groups(100) == 1
    assert Scheme(4, 25).groups(100) == 4
    with pytest.raises(
        ValueError, match="rows of 100 numbers are no multiple of the group size 64"
    ):
        Scheme(4, 64).groups(100)


def test_bits_of_a_matrix_are_codes_scales_and_zero_points():
    tensors = Scheme(4, 64, symmetric=False).matrix("weight", [100, 128])
    assert tensors == {
        "weight_packed": ([100, 16], torch.int32),
        "weight_scale": ([100, 2], None),
        "weight_shape": ([2], torch.int64),
        "weight_zero_point": ([13, 2], torch.int32),
    }
    assert "weight_zero_point" not in Scheme(4, 64).matrix("weight", [100, 128])


def test_rows_end_at_a_word_and_values_do_not():
    assert Scheme(3).matrix("weight", [4, 11])["weight_packed"][0] == [4, 2]  # 33 bits a row
    assert Scheme(3).values("values", [4, 11])["values_packed"][0] == [1, 5]  # 132 bits in all
    assert Scheme(3).values("values", [300])["values_scale"][0] == [3]
    assert Scheme(3, 64).values("values", [300])["values_scale"][0] == [5]


def test_only_matrices_and_values_become_integers():
    leaves = {
        "weight": ([0], torch.float32),
        "a.weight": ([8, 64], None),
        "b.bias": ([8], None),
        "values": ([100], None),
        "mask": ([8, 8], torch.uint8),
    }
    stored = Scheme(4).stored(leaves)
    assert stored == {
        "weight": ([0], torch.float32),
        **Scheme(4).matrix("a.weight", [8, 64]),
        "b.bias": ([8], None),
        **Scheme(4).values("values", [100]),
        "mask": ([8, 8], torch.uint8),
    }
