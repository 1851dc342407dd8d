"""Quantization parameters: their string form, and the tensors that store quantized matrices."""

import pytest
import torch

from lrc.compressors.layers import QuantizationArgs, TensorSpec

WRITTEN = [
    f"int{bits}{group}{zero}"
    for bits in range(2, 9)
    for group in ("", "-g1", "-g64", "-g128")
    for zero in ("", "-asymmetric")
] + ["int3-g16-s256", "int6-g256-s256"]


@pytest.mark.parametrize("written", WRITTEN)
def test_the_string_form_is_parsed_and_printed_alike(written):
    assert str(QuantizationArgs.parse(written)) == written


def test_the_parts_of_the_string_form_are_parsed():
    assert QuantizationArgs.parse("int8") == QuantizationArgs(8)
    assert QuantizationArgs.parse("int4-g64") == QuantizationArgs(4, 64)
    assert QuantizationArgs.parse("int3-g32-asymmetric") == QuantizationArgs(3, 32, symmetric=False)
    assert QuantizationArgs.parse("int3-g16-s256") == QuantizationArgs(3, 16, super_blocks=True)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "int",
        "int44",
        "4",
        "int4-g0",
        "int4-g",
        "int4g64",
        "INT4",
        "int4-g64-",
        " int4",
        "int4-g16-s128",
    ],
)
def test_other_texts_are_rejected(written):
    with pytest.raises(ValueError, match="must be written like"):
        QuantizationArgs.parse(written)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range_are_rejected(bits):
    with pytest.raises(ValueError, match=rf"bits must be in \[2, 8\], got {bits}"):
        QuantizationArgs.parse(f"int{bits}")
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        QuantizationArgs(4, 0)


@pytest.mark.parametrize("written", ["int3-s256", "int3-g48-s256", "int3-g512-s256"])
def test_groups_must_divide_their_super_block(written):
    with pytest.raises(ValueError, match="group_size must divide the super-block of 256, got"):
        QuantizationArgs.parse(written)
    with pytest.raises(ValueError, match="symmetric schemes only"):
        QuantizationArgs(4, 16, symmetric=False, super_blocks=True)


def test_codes_are_signed():
    for bits in range(2, 9):
        args = QuantizationArgs(bits)
        assert args.highest - args.lowest == 2**bits - 1
        assert args.lowest + args.highest == -1


def test_groups_fill_the_rows():
    assert QuantizationArgs(4).groups(100) == 1
    assert QuantizationArgs(4, 25).groups(100) == 4
    with pytest.raises(
        ValueError, match="rows of 100 numbers are not a multiple of the group size 64"
    ):
        QuantizationArgs(4, 64).groups(100)
    assert QuantizationArgs.parse("int3-g16-s256").groups(512) == 32
    with pytest.raises(ValueError, match=r"rows of 576 .* not a multiple of the super-block 256"):
        QuantizationArgs.parse("int3-g16-s256").groups(576)


def test_bits_of_a_matrix_are_codes_scales_and_zero_points():
    tensors = QuantizationArgs(4, 64, symmetric=False).matrix_specs("weight", [100, 128])
    assert tensors == {
        "weight_packed": TensorSpec([100, 16], torch.int32),
        "weight_scale": TensorSpec([100, 2]),
        "weight_shape": TensorSpec([2], torch.int64),
        "weight_zero_point": TensorSpec([13, 2], torch.int32),
    }
    assert "weight_zero_point" not in QuantizationArgs(4, 64).matrix_specs("weight", [100, 128])


def test_rows_end_at_a_word_and_values_do_not():
    int3 = QuantizationArgs(3)
    rows, values = int3.matrix_specs("w", [4, 11]), int3.values_specs("v", [4, 11])
    assert rows["w_packed"].shape == [4, 2]  # 33 bits per row
    assert values["v_packed"].shape == [1, 5]  # 132 bits in all
    assert int3.values_specs("v", [300])["v_scale"].shape == [3]
    assert QuantizationArgs(3, 64).values_specs("v", [300])["v_scale"].shape == [5]


def test_only_matrices_and_values_become_integers():
    specs = {
        "float32": TensorSpec([0], torch.float32),
        "a.weight": TensorSpec([8, 64], role="matrix"),
        "bias": TensorSpec([8]),
        "values": TensorSpec([100], role="values"),
        "mask": TensorSpec([8, 8], torch.uint8),
    }
    stored = QuantizationArgs(4).quantized_specs(specs)
    assert stored == {
        "float32": specs["float32"],
        **QuantizationArgs(4).matrix_specs("a.weight", [8, 64]),
        "bias": specs["bias"],
        **QuantizationArgs(4).values_specs("values", [100]),
        "mask": specs["mask"],
    }
