"""Blocks of GGUF, decoded by the gguf package, are the stored codes times their scales."""

import numpy as np
import pytest
import torch
import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from lrc.compressors.export.gguf_blocks import (
    BlockType,
    block_type,
    encode_floats,
    encode_integers,
    inexact_scales,
)
from lrc.compressors.export.stored_weights import Integers
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.layers.config import SENTINEL_BITS
from lrc.configs import shipped

ROWS, COLUMNS = 6, 192
GROUPS = ("", "-g32", "-g64", "-g96")
SMALLEST = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}


def integers(args: QuantizationArgs) -> Integers:
    """Return random codes that include the lowest and highest one, with bfloat16 scales."""
    generator = torch.Generator().manual_seed(args.bits)
    codes = torch.randint(
        args.lowest, args.highest + 1, (ROWS, COLUMNS), generator=generator, dtype=torch.int8
    )
    codes[0, :2] = torch.tensor([args.lowest, args.highest])
    groups = args.groups(COLUMNS)
    scale = torch.rand(ROWS, groups, generator=generator).add(0.1).mul(0.01).bfloat16()
    zero = None
    if not args.symmetric:
        zero = torch.randint(
            args.lowest, args.highest + 1, (ROWS, groups), generator=generator, dtype=torch.int8
        )
    return Integers(codes, scale, zero)


def expected(found: Integers) -> Tensor:
    """Return ``(codes - zero) * scale`` in float64, in which it is exact."""
    codes, scale, zero = found
    steps = codes.double().view(ROWS, scale.shape[1], -1)
    if zero is not None:
        steps = steps - zero.double()[:, :, None]
    return (steps * scale.double()[:, :, None]).view(ROWS, COLUMNS)


def blocks(args: QuantizationArgs) -> BlockType:
    found = block_type(args, COLUMNS)
    assert isinstance(found, BlockType)
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", SMALLEST)
def test_symmetric_integers_are_exact_in_the_smallest_type(bits: int, group: str) -> None:
    args = QuantizationArgs.parse(f"int{bits}{group}")
    found, kind = integers(args), blocks(args).kind
    assert kind.name == SMALLEST[bits]
    encoded = encode_integers(blocks(args), found)
    block, size = GGML_QUANT_SIZES[kind]
    assert encoded.shape == (ROWS, COLUMNS // block * size)
    decoded = torch.from_numpy(quants.dequantize(encoded, kind)).double()
    assert (decoded - expected(found)).abs().max() == 0.0


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("bits", "name"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
def test_asymmetric_integers_are_exact_up_to_the_float16_of_minimums(
    bits: int, name: str, group: str
) -> None:
    args = QuantizationArgs.parse(f"int{bits}{group}-asymmetric")
    found, kind = integers(args), blocks(args).kind
    assert kind.name == name
    decoded = torch.from_numpy(quants.dequantize(encode_integers(blocks(args), found), kind))
    difference = (decoded.double() - expected(found)).view(ROWS, found.scale.shape[1], -1)
    offset = 8 if name == "Q4_1" else 16
    assert found.zero is not None
    minimum = -(found.zero.double() + offset) * found.scale.double()
    rounding = minimum.half().double() - minimum
    # float32 holds `d * q + m` only to 24 bits.
    assert torch.allclose(difference, rounding[:, :, None].expand_as(difference), atol=1e-8)
    assert rounding.abs().max() <= minimum.abs().max() * 2.0**-11


def test_sizes_of_the_recipe_for_gguf_are_those_of_the_blocks() -> None:
    options = yaml.safe_load(shipped.read("gguf"))["stages"][0]["decompose"]
    for scheme in [*options["schemes"], options["embeddings"]]:
        args = QuantizationArgs.parse(scheme)
        component = ComponentConfig("dense", {}, args)
        config = WeightConfig((ROWS, COLUMNS), (component,))
        shape_bits = 2 * 64  # the stored shape
        counted = config.stored_bits(16) - SENTINEL_BITS - shape_bits
        block, size = GGML_QUANT_SIZES[blocks(args).kind]
        assert counted == ROWS * COLUMNS // block * size * 8


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        ("int4-g16", 64, "groups of int4-g16"),
        ("int4-g48", 96, "groups of int4-g48"),
        ("int8", 48, "rows of 48"),
        ("int6-g32-asymmetric", 64, "codes of 6 bits"),
    ],
)
def test_schemes_without_a_block_type_are_named(scheme: str, columns: int, reason: str) -> None:
    found = block_type(QuantizationArgs.parse(scheme), columns)
    assert isinstance(found, str)
    assert reason in found


def test_scales_that_float16_rounds_are_found() -> None:
    exact = torch.tensor([[2.0**-17 * 1.5, 3.0]], dtype=torch.bfloat16)
    assert inexact_scales(exact) is None
    small = torch.tensor([[2.0**-30, 3.0]], dtype=torch.bfloat16)
    assert "1 of 2 scales" in (inexact_scales(small) or "")
    assert inexact_scales(torch.tensor([[0.1]])) is not None


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_floats_are_rounded_within_half_a_step(name: str) -> None:
    kind = GGMLQuantizationType[name]
    W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    decoded = quants.dequantize(encode_floats(kind, W), kind).astype(np.float64)
    error = np.abs(decoded - W.double().numpy()).reshape(ROWS, -1, 32)
    largest = np.abs(W.double().numpy()).reshape(ROWS, -1, 32).max(axis=2, keepdims=True)
    # The scale of a block is rounded to float16, too.
    step = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.57 / 127, "Q4_0": 1.01 / 8}
    assert (error <= step[name] * largest).all()
