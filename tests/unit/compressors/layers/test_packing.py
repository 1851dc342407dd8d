"""Packed integers: compressed-tensors' own words, and the matrix that they stand for."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from torch import Tensor, nn

from lrc.compressors.layers.packed import (
    PackedMatrix,
    encode_matrix,
    encode_values,
    pack_integers,
    read_values,
    unpack_integers,
)
from lrc.compressors.layers.scheme import Scheme

BITS = range(2, 9)
WIDTHS = (1, 7, 32, 33, 65, 128)


def codes(rows: int, columns: int, bits: int) -> Tensor:
    scheme = Scheme(bits)
    generator = torch.Generator().manual_seed(columns)
    shape = rows, columns
    return torch.randint(scheme.lowest, scheme.highest + 1, shape, generator=generator).to(
        torch.int8
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_words_are_those_of_compressed_tensors(bits, columns):
    numbers = codes(5, columns, bits)
    packed = pack_integers(numbers, bits)
    assert torch.equal(packed, pack_to_int32(numbers, bits))
    assert torch.equal(unpack_from_int32(packed, bits, numbers.shape), numbers)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_what_is_packed_is_unpacked(bits, columns):
    numbers = codes(5, columns, bits)
    assert torch.equal(unpack_integers(pack_integers(numbers, bits), bits, columns), numbers)


def test_the_ends_of_the_range_survive():
    for bits in BITS:
        ends = torch.tensor([[Scheme(bits).lowest, Scheme(bits).highest] * 17], dtype=torch.int8)
        assert torch.equal(unpack_integers(pack_integers(ends, bits), bits, 34), ends)


@pytest.mark.parametrize("written", ["int4-g8", "int3", "int5-g16-asymmetric", "int8-asymmetric"])
def test_a_module_reads_the_tensors_of_a_file(written):
    scheme = Scheme.read(written)
    rows, columns = 6, 48
    numbers = codes(rows, columns, scheme.bits)
    groups = scheme.groups(columns)
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(0)) + 0.1
    zero = None if scheme.symmetric else codes(rows, groups, scheme.bits)
    module = PackedMatrix(columns=columns, rows=rows, scheme=scheme, dtype=torch.float32)
    tensors = encode_matrix("weight", numbers, scale, zero, scheme)
    assert {name: (list(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (shape, kind or torch.float32)
        for name, (shape, kind) in scheme.matrix("weight", [rows, columns]).items()
    }
    module.load_state_dict(tensors)
    width = columns // groups
    middle = 0 if zero is None else zero.repeat_interleave(width, 1).double()
    expected = (numbers.double() - middle) * scale.double().repeat_interleave(width, 1)
    torch.testing.assert_close(module.weight.double(), expected, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight))


def test_only_scales_can_be_trained():
    module = PackedMatrix(4, 32, Scheme(4, 8, symmetric=False), dtype=torch.bfloat16)
    assert [name for name, _ in module.named_parameters()] == ["weight_scale"]
    assert {name for name, _ in module.named_buffers()} == {
        "weight_packed",
        "weight_shape",
        "weight_zero_point",
    }


@pytest.mark.parametrize("written", ["int3-g8", "int4", "int8-g64"])
def test_values_have_groups_of_their_own(written):
    scheme = Scheme.read(written)
    width = scheme.group_size or 128
    numbers = codes(1, 300, scheme.bits)[0]
    scale = torch.arange(1.0, -(-300 // width) + 1)
    tensors = encode_values("values", numbers, scale, scheme)
    found = read_values(tensors["values_packed"], tensors["values_scale"], 300, scheme)
    assert torch.equal(found, numbers * (torch.arange(300) // width + 1.0))
