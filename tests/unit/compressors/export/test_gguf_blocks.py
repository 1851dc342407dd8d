"""Blocks of GGUF, decoded by the gguf package, are the stored codes times their scales."""

import numpy as np
import pytest
import torch
import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants
from torch import Tensor

from lrc.compressors.export.gguf_blocks import (
    encode_floats,
    encode_integers,
    inexact_scales,
    kind_of,
)
from lrc.compressors.export.gguf_metadata import file_type
from lrc.compressors.export.stored_weights import Integers
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.layers.gguf_types import BLOCK_TYPES, EXACT_SCHEMES, BlockType, block_type
from lrc.compressors.planning.measures import BITS, GGUF
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.configs import shipped
from lrc.configs.export_types import GGUF_TYPES

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
    steps = codes.double().view(*scale.shape, -1)
    if zero is not None:
        steps = steps - zero.double()[:, :, None]
    return (steps * scale.double()[:, :, None]).flatten(1)


def blocks(args: QuantizationArgs) -> BlockType:
    found = block_type(args, COLUMNS)
    assert isinstance(found, BlockType)
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", SMALLEST)
def test_symmetric_integers_are_exact_in_the_smallest_type(bits: int, group: str) -> None:
    args = QuantizationArgs.parse(f"int{bits}{group}")
    found, kind = integers(args), kind_of(blocks(args))
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
    found, kind = integers(args), kind_of(blocks(args))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("int2-g16-s256", "Q3_K"),
        ("int3-g16-s256", "Q3_K"),
        ("int3-g64-s256", "Q3_K"),
        ("int4-g16-s256", "Q6_K"),
        ("int6-g16-s256", "Q6_K"),
        ("int6-g256-s256", "Q6_K"),
    ],
)
def test_integers_of_super_blocks_are_exact(scheme: str, name: str, dtype: torch.dtype) -> None:
    args, columns = QuantizationArgs.parse(scheme), 512
    W = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    W[0] = 0
    W[1, 16:512] = 0
    W[2] *= 1e-6  # scales that are small next to the smallest numbers of float16
    W[3] *= 2000
    W[4, ::16] *= 100
    W[5, 256:] *= -1e-3
    matrix = round_to_nearest(W, args, dtype=dtype)
    found = Integers(matrix.codes, matrix.scale, None)
    kind = block_type(args, columns)
    assert isinstance(kind, BlockType)
    assert kind.name == name
    assert inexact_scales(found.scale, args) is None
    encoded = encode_integers(kind, found)
    assert encoded.shape == (7, columns // kind.block * kind.bytes)
    decoded = torch.from_numpy(quants.dequantize(encoded, kind_of(kind))).double()
    assert torch.equal(decoded, expected(found))


def test_scales_that_have_no_common_number_are_named() -> None:
    args = QuantizationArgs.parse("int3-g16-s256")
    scale = torch.arange(1, 17, dtype=torch.float16)[None]
    assert inexact_scales(scale, args) is None
    scale[0, 3] += 0.25
    assert "multiples of a common number" in (inexact_scales(scale, args) or "")
    scale[0, 3] = torch.inf
    assert inexact_scales(scale, args) is not None


def test_sizes_are_those_of_the_blocks() -> None:
    assert [each.name for each in BLOCK_TYPES] == sorted(
        (each.name for each in BLOCK_TYPES),
        key=lambda name: np.divide(*GGML_QUANT_SIZES[GGMLQuantizationType[name]][::-1]),
    )
    for kind in BLOCK_TYPES:
        assert (kind.block, kind.bytes) == GGML_QUANT_SIZES[kind_of(kind)]


def test_every_type_has_a_type_of_files() -> None:
    names = [*(each.name for each in BLOCK_TYPES), *(name.upper() for name in GGUF_TYPES)]
    for name in names:
        found = file_type([GGMLQuantizationType[name], GGMLQuantizationType[name]])
        assert name in LlamaFileType(found).name


def test_the_recipe_for_gguf_counts_the_bits_of_the_blocks() -> None:
    options = yaml.safe_load(shipped.read("gguf"))["stages"][0]["decompose"]
    assert options["measure"] == GGUF.name
    rows, columns = 6, 512
    for scheme in [*options["schemes"], options["embeddings"]]:
        args = QuantizationArgs.parse(scheme)
        assert args in EXACT_SCHEMES
        kind = block_type(args, columns)
        assert isinstance(kind, BlockType)
        config = WeightConfig((rows, columns), (ComponentConfig("dense", {}, args),))
        found = round_to_nearest(torch.ones(rows, columns), args, dtype=torch.bfloat16)
        encoded = encode_integers(kind, Integers(found.codes, found.scale, None))
        assert GGUF.compressed(config, config.stored_bits(16)) == 8 * encoded.size
    # What has no block type is stored as a dense matrix.
    for text in ("int4-g16", "int6-g32-asymmetric"):
        component = ComponentConfig("dense", {}, QuantizationArgs.parse(text))
        config = WeightConfig((rows, columns), (component,))
        assert GGUF.compressed(config, 0) == rows * columns * 16
    assert GGUF.dense((rows, columns), 7) == BITS.dense((rows, columns), 7)


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        ("int4-g16", 64, "groups of int4-g16"),
        ("int4-g48", 96, "groups of int4-g48"),
        ("int8", 48, "rows of 48"),
        ("int6-g32-asymmetric", 64, "codes of 6 bits"),
        ("int3-g16-s256", 576, "rows of 576 numbers are not a multiple of 256"),
        ("int3-g8-s256", 512, "groups of int3-g8-s256"),
        ("int8-g16-s256", 512, "super-blocks with codes of 8 bits"),
    ],
)
def test_schemes_without_a_block_type_are_named(scheme: str, columns: int, reason: str) -> None:
    found = block_type(QuantizationArgs.parse(scheme), columns)
    assert isinstance(found, str)
    assert reason in found


def test_scales_that_float16_rounds_are_found() -> None:
    args = QuantizationArgs.parse("int4-g32")
    exact = torch.tensor([[2.0**-17 * 1.5, 3.0]], dtype=torch.bfloat16)
    assert inexact_scales(exact, args) is None
    small = torch.tensor([[2.0**-30, 3.0]], dtype=torch.bfloat16)
    assert "1 of 2 scales" in (inexact_scales(small, args) or "")
    assert inexact_scales(torch.tensor([[0.1]]), args) is not None


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
