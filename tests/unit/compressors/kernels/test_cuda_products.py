"""The kernels in CUDA C++, on a GPU: equal to the plain product but for rounding."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lrc.compressors.kernels import few_tokens, masked, masked_cuda, nvrtc, one_row, packed_linear
from lrc.compressors.kernels.few_tokens import Blocks
from lrc.compressors.kernels.mask_places import starts_and_offsets
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.bitmask import pack_bits
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import encode_matrix, pack_integers

SCHEMES = [
    "int2-g32",
    "int2-asymmetric",
    "int3",
    "int3-g32",
    "int3-g32-asymmetric",
    "int3-g20",
    "int4",
    "int4-g32",
    "int4-g20-asymmetric",
    "int5-g32",
    "int6-asymmetric",
    "int7",
    "int8",
    "int8-g32-asymmetric",
    "int8-g20-asymmetric",
]
HALVES = [torch.bfloat16, torch.float16]
ROWS = (1, 17)
BLOCKS = (Blocks(8, 1, 8, 2), Blocks(16, 2, 4, 1))
"""Few, because a kernel is compiled for its tokens, tiles, warps and stages: half a second each."""


def check(multiply, matrix, dtype, columns, tokens, rounding):
    """Compare a product with that of a matrix in float64."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    x = (x + 0.5).to("cuda", dtype)
    y = multiply(x)
    assert y.dtype == dtype
    exact = x.double() @ matrix.T
    # Weights and results are rounded once, sums are float32 in any order.
    bound = (x.double().abs() @ matrix.abs().T).max()
    error = (y.double() - exact).abs().max()
    assert error <= bound * (rounding(columns, torch.float32) + 2 * torch.finfo(dtype).eps)


def packed(scheme: str, d_out: int, d_in: int, dtype: torch.dtype) -> PackedLinear:
    args = QuantizationArgs.parse(scheme)
    generator = torch.Generator().manual_seed(d_out)
    shape = d_out, args.groups(d_in)
    codes = torch.randint(args.lowest, args.highest + 1, (d_out, d_in), generator=generator)
    scale = torch.rand(shape, generator=generator).add(0.5).to(dtype)
    zero = torch.randint(args.lowest, args.highest + 1, shape, generator=generator)
    module = PackedLinear(d_in, d_out, args, dtype=dtype).requires_grad_(False)
    module.load_state_dict(
        encode_matrix("weight", codes, scale, None if args.symmetric else zero, args)
    )
    return module.cuda()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_integers(scheme, dtype, rounding):
    shapes = ((37, 160), (40, 640)) if "g" in scheme else ((37, 160), (5, 77), (40, 640))
    for d_out, d_in in shapes:
        module = packed(scheme, d_out, d_in, dtype)
        scale, zero = module.weight_scale, module.zero_points()
        steps = module.codes().double().unflatten(1, (scale.shape[1], -1))
        steps = steps if zero is None else steps - zero.double()[:, :, None]
        matrix = (steps * scale.double()[:, :, None]).flatten(1)
        stored = (module.weight_packed, scale, module._buffers.get("weight_zero_point"))
        bits = module.args.bits
        for tokens in ROWS:
            check(
                lambda x: packed_linear.product(x, *stored, bits),  # noqa: B023
                matrix,
                dtype,
                d_in,
                tokens,
                rounding,
            )
        blocks = BLOCKS[bits % 2]
        check(
            lambda x: packed_linear.product(x, *stored, bits, blocks),  # noqa: B023
            matrix,
            dtype,
            d_in,
            19,
            rounding,
        )
        written = packed_linear.matrix(*stored, bits, d_in)
        torch.testing.assert_close(written.double(), matrix, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", range(1, 8))
def test_n_of_eight(n, dtype, rounding):
    generator = torch.Generator().manual_seed(n)
    for d_out, columns in ((37, 160), (40, 640)):
        mask = (torch.rand(d_out, columns // 8, 8, generator=generator).argsort(2) < n).flatten(1)
        W = torch.randn(d_out, columns, generator=generator).to(dtype) * mask
        values = W[mask].view(d_out, -1, n).cuda()
        stored = masked_cuda.EightOf(values, pack_bits(mask).cuda(), n)
        assert masked_cuda.serves_eight_of(stored, columns)
        for tokens in ROWS:
            check(
                lambda x: masked_cuda.eight_of(x, stored),  # noqa: B023
                W.cuda().double(),
                dtype,
                columns,
                tokens,
                rounding,
            )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scheme", ["int4-g8", "int4-g16", "int4-g64", "int8-g16", "int2-g32"])
def test_groups(scheme, dtype, rounding):
    args = QuantizationArgs.parse(scheme)
    size = args.group_size
    generator = torch.Generator().manual_seed(size)
    for d_out, columns in ((37, 320), (40, 64 * size)):
        mask = torch.rand(d_out, columns // size, generator=generator) < 0.5
        count = int(mask.sum())
        codes = torch.randint(args.lowest, args.highest + 1, (count, size), generator=generator)
        scale = torch.rand(count, generator=generator).add(0.5).to(dtype)
        W = torch.zeros(d_out, columns // size, size, dtype=torch.float64)
        W[mask] = codes.double() * scale.double()[:, None]
        whole = masked_cuda.padded(pack_bits(mask).cuda())
        starts, offsets = starts_and_offsets(whole)
        words = pack_integers(codes.view(1, -1), args.bits).cuda()
        stored = masked_cuda.Groups(words, scale.cuda(), whole, starts, offsets, args.bits, size)
        assert masked_cuda.serves_groups(stored, columns)
        for tokens in ROWS:
            check(
                lambda x: masked_cuda.groups(x, [stored])[0],  # noqa: B023
                W.flatten(1).cuda(),
                dtype,
                columns,
                tokens,
                rounding,
            )


def grouped(d_out: int, columns: int, dtype: torch.dtype) -> masked.Masked:
    """Return a random matrix in groups of 16 integers of 4 bits, about half of them."""
    generator = torch.Generator().manual_seed(d_out)
    mask = torch.rand(d_out, columns // 16, generator=generator) < 0.5
    codes = torch.randint(-8, 8, (1, 16 * int(mask.sum())), generator=generator)
    scale = torch.rand(int(mask.sum()), generator=generator).add(0.5).to("cuda", dtype)
    bits = pack_bits(mask).cuda()
    words = pack_integers(codes, 4).cuda()
    places = masked.find_places(bits, columns)
    bits = places.pop("padded", bits)
    return masked.Masked(masked.GROUPS, columns, words, bits, scale, bits=4, group=16, **places)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 17, 80])
@pytest.mark.parametrize("heights", [(37, 5), (24, 8, 160)])
def test_several_matrices_in_one_launch(heights, tokens, compiling):
    """Equal to single launches but for the order of the sums: the matrices have few rows."""
    torch.compiler.reset()
    x = torch.randn(tokens, 320, device="cuda", dtype=torch.bfloat16)

    def integers(x):
        matrices = [(m.weight_packed, m.weight_scale, m._buffers.get(Z), 3) for m in modules]
        return packed_linear.run_together(x, matrices), [packed_linear.run(x, *m) for m in matrices]

    def groups(x):
        return masked.run_together(x, [(g,) for g in stored]), [masked.run(x, g) for g in stored]

    Z = "weight_zero_point"
    modules = [packed("int3-g32-asymmetric", rows, 320, torch.bfloat16) for rows in heights]
    stored = [grouped(rows, 320, torch.bfloat16) for rows in heights]
    for multiply in (integers, groups):
        function = torch.compile(multiply, fullgraph=True) if compiling else multiply
        together, single = function(x)
        for y, alone in zip(together, single, strict=True):
            largest = float(alone.float().abs().max()) if alone.numel() else 0.0
            torch.testing.assert_close(y.float(), alone.float(), rtol=0, atol=2**-7 * largest)


def test_matrices_of_other_schemes_are_not_launched_together():
    x = torch.randn(1, 320, device="cuda", dtype=torch.bfloat16)
    matrices = []
    for scheme in ("int3-g32", "int3-g64"):
        module = packed(scheme, 40, 320, torch.bfloat16)
        matrices.append((module.weight_packed, module.weight_scale, None, 3))
    assert packed_linear.run_together(x, matrices) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_row_of_a_dense_matrix(dtype, rounding):
    one_row.prepare(torch.device("cuda"))
    for d_out, columns in ((37, 77), (40, 640)):
        W = torch.randn(d_out, columns, generator=torch.Generator().manual_seed(0))
        W = W.to("cuda", dtype)
        for tokens in (1, 2):
            check(
                lambda x: one_row.linear(x, W),  # noqa: B023
                W.double(),
                dtype,
                columns,
                tokens,
                rounding,
            )


def test_a_kernel_runs_in_a_thread_that_has_not_used_the_device():
    from concurrent.futures import ThreadPoolExecutor

    module = packed("int4-g32", 64, 128, torch.bfloat16)
    x = torch.ones(1, 128, device="cuda", dtype=torch.bfloat16)

    def product():
        return packed_linear.product(x, module.weight_packed, module.weight_scale, None, 4)

    expected = product()
    with ThreadPoolExecutor(1) as threads:
        assert torch.equal(threads.submit(product).result(), expected)


def test_an_error_of_the_compiler_is_shown():
    with pytest.raises(nvrtc.CompilationError, match=r"few_tokens\.cuh"):
        nvrtc.kernel("n8_linear.cu", "product", (("N", 4),), 0)


def test_blocks_fit_the_columns():
    for d_out in (8, 576, 4096, 128256):
        for d_in in (32, 576, 14336):
            blocks = few_tokens.blocks_for(1, d_out, d_in, tiles=2)
            assert blocks.warps == 2 or blocks.warps <= -(-d_in // 128)
