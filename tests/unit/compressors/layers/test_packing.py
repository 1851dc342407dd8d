"""Packed integers: the words of compressed-tensors, and the matrix that they represent."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from torch import Tensor, nn

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import (
    encode_matrix,
    encode_values,
    pack_integers,
    read_values,
    unpack_integers,
)

BITS = range(2, 9)
WIDTHS = (1, 7, 32, 33, 65, 128)


def codes(rows: int, columns: int, bits: int) -> Tensor:
    args = QuantizationArgs(bits)
    generator = torch.Generator().manual_seed(columns)
    shape = rows, columns
    return torch.randint(args.lowest, args.highest + 1, shape, generator=generator).to(torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_words_equal_those_of_compressed_tensors(bits, columns):
    numbers = codes(5, columns, bits)
    packed = pack_integers(numbers, bits)
    assert torch.equal(packed, pack_to_int32(numbers, bits))
    assert packed.shape == (5, -(-columns * bits // 32))
    assert torch.equal(unpack_from_int32(packed, bits, numbers.shape), numbers)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_unpacking_inverts_packing(bits, columns):
    numbers = codes(5, columns, bits)
    assert torch.equal(unpack_integers(pack_integers(numbers, bits), bits, columns), numbers)


@pytest.mark.parametrize("bits", BITS)
def test_transposed_words_are_unpacked(bits):
    """Zero points of a few rows are one word for each group."""
    numbers = codes(6, 4, bits)
    packed = pack_integers(numbers, bits).T.contiguous()
    assert torch.equal(unpack_integers(packed.T, bits, 4), numbers)


def test_the_smallest_and_largest_codes_are_kept():
    for bits in BITS:
        args = QuantizationArgs(bits)
        ends = torch.tensor([[args.lowest, args.highest] * 17], dtype=torch.int8)
        assert torch.equal(unpack_integers(pack_integers(ends, bits), bits, 34), ends)


@pytest.mark.parametrize("written", ["int4-g8", "int3", "int5-g16-asymmetric", "int8-asymmetric"])
def test_a_module_reads_the_tensors_of_a_file(written):
    args = QuantizationArgs.parse(written)
    rows, columns = 6, 48
    numbers = codes(rows, columns, args.bits)
    groups = args.groups(columns)
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(0)) + 0.1
    zero = None if args.symmetric else codes(rows, groups, args.bits)
    module = PackedLinear(columns, rows, args, dtype=torch.float32)
    tensors = encode_matrix("weight", numbers, scale, zero, args)
    assert {name: (list(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype or torch.float32)
        for name, spec in args.matrix_specs("weight", [rows, columns]).items()
    }
    module.load_state_dict(tensors)
    width = columns // groups
    middle = 0 if zero is None else zero.repeat_interleave(width, 1).double()
    expected = (numbers.double() - middle) * scale.double().repeat_interleave(width, 1)
    torch.testing.assert_close(module.weight.double(), expected, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight))


def test_only_scales_can_be_trained():
    module = PackedLinear(32, 4, QuantizationArgs(4, 8, symmetric=False), dtype=torch.bfloat16)
    assert [name for name, _ in module.named_parameters()] == ["weight_scale"]
    assert {name for name, _ in module.named_buffers()} == {
        "weight_packed",
        "weight_shape",
        "weight_zero_point",
    }


@pytest.mark.parametrize("written", ["int3-g8", "int4", "int8-g64"])
def test_values_are_grouped_without_regard_to_rows(written):
    args = QuantizationArgs.parse(written)
    width = args.group_size or 128
    numbers = codes(1, 300, args.bits)[0]
    scale = torch.arange(1.0, -(-300 // width) + 1)
    tensors = encode_values("values", numbers, scale, args)
    found = read_values(tensors["values_packed"], tensors["values_scale"], 300, args)
    assert torch.equal(found, numbers * (torch.arange(300) // width + 1.0))
