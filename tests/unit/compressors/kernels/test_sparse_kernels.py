"""The Triton kernels for sparse matrices, on a GPU or with ``TRITON_INTERPRET=1``."""

import os

import pytest
import torch

from lrc.compressors.kernels.mask_places import starts_and_offsets
from lrc.compressors.kernels.masked import EIGHT_OF, FREE, GROUPS, Masked
from lrc.compressors.layers.bitmask import pack_bits
from lrc.compressors.layers.packing import pack_integers, read_values
from lrc.compressors.layers.quantization_args import QuantizationArgs

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from lrc.compressors.kernels import masked_triton, n8_triton  # noqa: E402
from lrc.compressors.kernels.masked_triton import Blocks  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter multiplies bfloat16 matrices as integers, and truncates to bfloat16.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
SMALL = Blocks(2, 8, 1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def free(d_out, columns, dtype, generator, density=0.55):
    mask = torch.rand(d_out, columns, generator=generator) < density
    W = torch.randn(d_out, columns, generator=generator).to(dtype) * mask
    packed = pack_bits(mask).to(DEVICE)
    starts, offsets = starts_and_offsets(packed)
    values = W[mask].to(DEVICE)
    return W, Masked(FREE, columns, values, packed, starts=starts, offsets=offsets)


def eight_of(d_out, groups, n, dtype, generator):
    mask = (torch.rand(d_out, groups, 8, generator=generator).argsort(2) < n).flatten(1)
    W = torch.randn(d_out, 8 * groups, generator=generator).to(dtype) * mask
    values = W[mask].view(d_out, groups, n).to(DEVICE)
    return W, Masked(EIGHT_OF, 8 * groups, values, pack_bits(mask).to(DEVICE), n=n)


def quantized(d_out, columns, args, dtype, generator):
    mask = torch.rand(d_out, columns, generator=generator) < 0.55
    count, size = int(mask.sum()), args.group_size
    codes = torch.randint(args.lowest, args.highest + 1, (1, count), generator=generator)
    scale = torch.rand(-(-count // size), generator=generator).add(0.5).to(dtype)
    words = pack_integers(codes, args.bits)
    values = read_values(words, scale, count, args)
    W = torch.zeros(d_out, columns, dtype=dtype).masked_scatter(mask, values)
    packed = pack_bits(mask).to(DEVICE)
    starts, offsets = starts_and_offsets(packed)
    words, scale = words.to(DEVICE), scale.to(DEVICE)
    return W, Masked(FREE, columns, words, packed, scale, starts, offsets, 0, args.bits, size)


def groups(d_out, per_row, args, dtype, generator):
    size = args.group_size
    mask = torch.rand(d_out, per_row, generator=generator) < 0.5
    count = int(mask.sum())
    codes = torch.randint(args.lowest, args.highest + 1, (count, size), generator=generator)
    scale = torch.rand(count, generator=generator).add(0.5).to(dtype)
    W = torch.zeros(d_out, per_row, size, dtype=dtype)
    W[mask] = codes.to(dtype) * scale[:, None]
    packed = pack_bits(mask).to(DEVICE)
    starts, offsets = starts_and_offsets(packed)
    words = pack_integers(codes.view(1, -1), args.bits).to(DEVICE)
    stored = Masked(
        GROUPS, per_row * size, words, packed, scale.to(DEVICE), starts, offsets, 0, args.bits, size
    )
    return W.flatten(1), stored


def check(product, W, stored, rows, generator, rounding, **options):
    x = torch.randn(rows, stored.columns, generator=generator).to(W.dtype)
    exact = x.double() @ W.double().T
    y = product(x.to(DEVICE), stored, **options).cpu()
    assert y.dtype == W.dtype
    bound = (x.double().abs() @ W.double().abs().T).max()
    # Sums are float32; entries of W that are products of codes and scales may be rounded or not.
    error = (y.double() - exact).abs().max()
    assert error <= bound * (rounding(stored.columns, torch.float32) + 2 * torch.finfo(W.dtype).eps)


PRODUCTS = {"few": (masked_triton.few_rows, 3), "some": (masked_triton.some_rows, 16)}


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("d_out", "columns"), [(5, 128), (7, 99), (2, 65)])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_values_anywhere(kind, d_out, columns, dtype, generator, rounding):
    product, rows = PRODUCTS[kind]
    W, stored = free(d_out, columns, dtype, generator)
    check(product, W, stored, rows, generator, rounding, blocks=SMALL)
    check(product, W, stored, 1, generator, rounding, blocks=SMALL)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_rows(density, generator, rounding):
    W, stored = free(3, 72, HALF, generator, density)
    if density == 0:
        stored = stored._replace(values=stored.mask.new_zeros(1, dtype=HALF))
    check(masked_triton.few_rows, W, stored, 1, generator, rounding, blocks=SMALL)
    assert torch.equal(masked_triton.expand(stored, SMALL).cpu(), W)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize("n", range(1, 8))
def test_n_of_eight(n, dtype, generator, rounding):
    def permuted(x, stored, blocks):
        return n8_triton.few_rows(x, stored.values, stored.mask, stored.n, blocks)

    W, stored = eight_of(5, 11, n, dtype, generator)
    check(permuted, W, stored, 1, generator, rounding, blocks=SMALL)
    check(permuted, W, stored, 3, generator, rounding, blocks=SMALL)
    check(masked_triton.few_rows, W, stored, 2, generator, rounding, blocks=SMALL)
    if dtype == HALF:
        check(masked_triton.some_rows, W, stored, 5, generator, rounding, blocks=SMALL)
    assert torch.equal(masked_triton.expand(stored, SMALL).cpu(), W)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int2-g128", "int3-g32", "int4-g16", "int5-g8", "int8-g128"])
def test_quantized_values(scheme, dtype, generator, rounding):
    args = QuantizationArgs.parse(scheme)
    for d_out, columns in ((5, 128), (7, 99)):
        W, stored = quantized(d_out, columns, args, dtype, generator)
        assert torch.equal(masked_triton.expand(stored, SMALL).cpu(), W)
        for product, rows in PRODUCTS.values():
            check(product, W, stored, rows, generator, rounding, blocks=SMALL)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int2-g16", "int3-g8", "int4-g16", "int4-g64", "int8-g32"])
def test_groups_of_integers(scheme, dtype, generator, rounding):
    args = QuantizationArgs.parse(scheme)
    for d_out, per_row in ((5, 9), (2, 70 if args.group_size == 8 else 11)):
        W, stored = groups(d_out, per_row, args, dtype, generator)
        assert torch.equal(masked_triton.expand(stored, SMALL).cpu(), W)
        for product, rows in PRODUCTS.values():
            check(product, W, stored, rows, generator, rounding, blocks=SMALL)
