"""Grids: their range, their rounding errors, and what they reject."""

import pytest
import torch

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.gptq import gptq
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.quantization_grid import Grid, ScaleOverflow, find_grid, round_to_grid
from lrc.compressors.solvers.quantized_matrix import round_to_nearest

SCHEMES = [f"int{bits}{rest}" for bits in range(2, 9) for rest in ("", "-g8", "-g8-asymmetric")]


@pytest.mark.parametrize("written", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_zero_points_are_in_range_and_scales_in_the_files_precision(
    matrices, written, dtype
):
    W, _ = matrices()
    W[:, 8:16] += 3  # a group without zero
    scheme = QuantizationArgs.parse(written)
    found = round_to_nearest(W, scheme, dtype=dtype)
    assert found.scale.dtype == dtype
    assert found.scale.shape == (12, scheme.groups(32))
    for codes in (found.codes, found.zero):
        assert (codes is None) == (codes is found.zero and scheme.symmetric)
        if codes is not None:
            assert codes.dtype == torch.int8
            assert scheme.lowest <= int(codes.min())
            assert int(codes.max()) <= scheme.highest


@pytest.mark.parametrize("written", SCHEMES)
def test_the_search_beats_the_widest_range(matrices, written):
    W, _ = matrices()
    scheme = QuantizationArgs.parse(written)
    groups = W.view(12, scheme.groups(32), -1)
    if scheme.symmetric:
        widest = Grid((groups.abs().amax(2) / scheme.highest).to(torch.bfloat16), None)
    else:
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scale = ((high - low) / (scheme.highest - scheme.lowest)).to(torch.bfloat16)
        zero = (scheme.lowest - low / scale).round().clamp(scheme.lowest, scheme.highest)
        widest = Grid(scale, zero.to(torch.int8))
    scale, zero = (None if t is None else t.double() for t in widest.expand(32))
    steps = round_to_grid(W, widest, scheme).double()
    values = (steps if zero is None else steps - zero) * scale
    found = round_to_nearest(W, scheme, dtype=torch.bfloat16)
    assert weighted_error(W, found.weight()) <= weighted_error(W, values) * (1 + 1e-6)


def test_every_code_is_the_nearest_to_its_number(matrices):
    W, _ = matrices()
    for written in ("int3-g8", "int3-g8-asymmetric"):
        scheme = QuantizationArgs.parse(written)
        found = round_to_nearest(W, scheme, dtype=torch.bfloat16)
        every = torch.arange(scheme.lowest, scheme.highest + 1).double()
        scale, zero = Grid(found.scale, found.zero).expand(32)
        middle = torch.zeros_like(scale) if zero is None else zero
        values = (every - middle.double()[:, :, None]) * scale.double()[:, :, None]
        least = (values - W[:, :, None]).abs().amin(2)
        torch.testing.assert_close((found.weight() - W).abs(), least)


def test_the_largest_number_of_a_group_may_take_the_least_code():
    W = torch.tensor([[8.0, -7, 6, -5, 4, -3, 2, -1]])
    found = round_to_nearest(W, QuantizationArgs.parse("int4"), dtype=torch.bfloat16)
    assert torch.equal(found.weight(), W.double())
    assert float(found.scale) == -1


def test_weights_decide_which_columns_a_grid_is_for(matrices):
    W, _ = matrices()
    scheme = QuantizationArgs.parse("int3")
    weights = torch.ones(32)
    weights[::2] = 1e4
    heeded = find_grid(W, scheme, dtype=torch.bfloat16, weights=weights)
    even = find_grid(W, scheme, dtype=torch.bfloat16)
    H = torch.diag(weights)

    def lost(grid: Grid) -> float:
        return weighted_error(W, round_to_grid(W, grid, scheme) * grid.expand(32)[0].double(), H)

    assert lost(heeded) < lost(even)


@pytest.mark.parametrize("written", ["int4-g8", "int4-g8-asymmetric"])
def test_a_group_of_zeros_has_a_scale_and_comes_back(matrices, written):
    W, _ = matrices()
    W[2, 8:16] = 0
    W[5] = 0
    found = round_to_nearest(W, QuantizationArgs.parse(written), dtype=torch.bfloat16)
    assert bool(torch.isfinite(found.scale).all())
    assert bool(found.scale.all())
    assert not found.weight()[2, 8:16].any()
    assert not found.weight()[5].any()


def test_codes_belong_to_the_scale_as_stored():
    W = torch.tensor([[127.0, 84.6]]) / 3  # thirds are no bfloat16 numbers
    found = round_to_nearest(W, QuantizationArgs.parse("int8"), dtype=torch.bfloat16)
    step = found.scale.abs().double()
    assert bool(((found.weight() - W).abs() <= step / 2).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_rejected(matrices, bad):
    W, _ = matrices()
    W[3, 4] = bad
    with pytest.raises(ValueError, match=r"the matrix \[12, 32\] holds infinities or NaN"):
        round_to_nearest(W, QuantizationArgs.parse("int4"), dtype=torch.bfloat16)


def test_scales_that_the_file_cannot_hold_are_rejected(matrices):
    W, _ = matrices()
    with pytest.raises(ScaleOverflow, match=r"scales up to .* overflow torch.float16"):
        round_to_nearest(W * 1e6, QuantizationArgs.parse("int4"), dtype=torch.float16)


@pytest.mark.parametrize("scheme", ["int8", "int4-g8", "int4-g8-asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_below_all_scales_are_rounded_on_the_least(matrices, scheme, dtype):
    W, H = matrices()
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    W[0] *= least / W[0].abs().max()  # a row that is nearly gone, in a usual matrix
    for found in (
        round_to_nearest(W, QuantizationArgs.parse(scheme), dtype=dtype),
        gptq(W, H, QuantizationArgs.parse(scheme), dtype=dtype),
    ):
        assert bool((found.scale != 0).all())
        assert bool(torch.isfinite(found.scale).all())
        assert float((found.weight() - W)[0].abs().max()) <= 2 * least
    exact = round_to_nearest(W[:1], QuantizationArgs.parse(scheme), dtype=dtype).weight() - W[:1]
    assert float(exact.abs().max()) <= 0.51 * least


def test_rows_that_groups_do_not_fill_are_rejected(matrices):
    W, _ = matrices()
    with pytest.raises(ValueError, match="not a multiple of the group size 64"):
        round_to_nearest(W, QuantizationArgs.parse("int4-g64"), dtype=torch.bfloat16)
