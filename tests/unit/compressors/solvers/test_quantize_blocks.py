"""Blocks of a weight: exact refits, exact counts, and lower errors than plain rounding."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.block_search import masked, select_blocks
from lrc.compressors.solvers.gptq import gptq
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.quantize_blocks import quantize_blocks
from lrc.compressors.solvers.quantized_matrix import round_to_nearest

BF16 = torch.bfloat16
INT4 = QuantizationArgs.parse("int4-g8")
ROWS, COLUMNS, WIDTH = 20, 80, 8
A_ROW = COLUMNS // WIDTH


@pytest.fixture
def problem(matrices) -> tuple[Tensor, Tensor]:
    return matrices(rows=ROWS, columns=COLUMNS)


def exact(W: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """Return the best weight with the groups of a mask, one linear system a row."""
    best = torch.zeros_like(W)
    for row, kept in enumerate(mask.repeat_interleave(WIDTH, dim=1)):
        best[row, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W[row])
    return best


def test_importance_is_the_rise_of_the_error_when_one_group_goes(problem):
    W, H = problem
    rises = torch.empty(ROWS, A_ROW, dtype=torch.float64)
    for group in range(A_ROW):
        mask = torch.ones(ROWS, A_ROW, dtype=torch.bool)
        mask[:, group] = False
        E = W - exact(W, damped(H, 0.01), mask)
        rises[:, group] = ((E @ damped(H, 0.01)) * E).sum(dim=1)
    _, mask = select_blocks(W, H, 70, A_ROW, damp=0.01, rounds=0)
    assert int(mask.sum()) == 70
    assert float(rises[mask].min()) > float(rises[~mask].max())


@pytest.mark.parametrize("groups", [1, 60, 100, 199])
def test_the_refit_is_that_of_one_linear_system_a_row(problem, groups):
    W, H = problem
    W_hat, mask = select_blocks(W, H, groups, A_ROW, damp=0.01, last_steps=300)
    torch.testing.assert_close(W_hat, exact(W, damped(H, 0.01), mask), rtol=1e-6, atol=1e-8)
    assert not W_hat[~mask.repeat_interleave(WIDTH, dim=1)].any()


@pytest.mark.parametrize("steps", [0, 1, 20])
@pytest.mark.parametrize("groups", [1, 60, 100, 200])
def test_a_refit_never_raises_the_error_of_a_row(problem, groups, steps):
    W, H = problem
    W_hat, mask = select_blocks(W, H, groups, A_ROW, damp=0.01, last_steps=steps)
    for row, refit, plain in zip(W, W_hat, masked(W, mask), strict=True):
        assert weighted_error(row[None], refit[None], H) <= weighted_error(
            row[None], plain[None], H
        )


@pytest.mark.parametrize("groups", [60, 100, 150])
def test_swaps_lower_the_error(problem, groups):
    W, H = problem
    found = [
        select_blocks(W, H, groups, A_ROW, damp=0.01, rounds=rounds, last_steps=300)[0]
        for rounds in (0, 8)
    ]
    assert weighted_error(W, found[1], H) < weighted_error(W, found[0], H)


@pytest.mark.parametrize("groups", [1, 77, 199, 200])
def test_exactly_so_many_groups_are_kept_and_the_budget_is_the_whole_matrix_s(problem, groups):
    W, H = problem
    W[:5] *= 100  # rows that matter more keep more
    found = quantize_blocks(W, H, groups, INT4, dtype=BF16)
    assert found.codes.shape == (groups, WIDTH)
    assert found.codes.dtype == torch.int8
    assert found.scale.shape == (groups,)
    assert found.scale.dtype == BF16
    assert int(found.mask.sum()) == groups
    assert int(found.mask[:5].sum()) == min(groups, 5 * A_ROW)
    assert INT4.lowest <= int(found.codes.min()) <= int(found.codes.max()) <= INT4.highest


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_with_all_groups_it_is_gptq(problem, dtype):
    W, H = problem
    found = quantize_blocks(W, H, ROWS * A_ROW, INT4, dtype=dtype)
    plain = gptq(W, H, INT4, dtype=dtype, shrinkage=0.0)
    assert torch.equal(found.codes, plain.codes.view(-1, WIDTH))
    assert torch.equal(found.scale, plain.scale.flatten())


@pytest.mark.parametrize("written", ["int4-g8", "int3-g16", "int2-g40", "int8-g4"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_rounding_within_the_mask_beats_rounding_to_nearest(problem, written, dtype):
    W, H = problem
    scheme = QuantizationArgs.parse(written)
    a_row = scheme.groups(COLUMNS)
    groups = ROWS * a_row // 2
    found = quantize_blocks(W, H, groups, scheme, dtype=dtype)
    W_hat, mask = select_blocks(W, H, groups, a_row, damp=0.01)
    assert torch.equal(found.mask, mask)
    nearest = masked(round_to_nearest(W_hat, scheme, dtype=dtype, H=H).weight(), mask)
    assert weighted_error(W, found.weight(), H) < weighted_error(W, nearest, H)


def test_the_numbers_are_codes_times_scales_exactly(problem):
    W, H = problem
    found = quantize_blocks(W, H, 90, INT4, dtype=BF16)
    whole = found.weight().view(ROWS, A_ROW, WIDTH)
    assert not whole[~found.mask].any()
    assert torch.equal(whole[found.mask], found.codes * found.scale.double()[:, None])


def test_twice_the_same(problem):
    W, H = problem
    first, second = (quantize_blocks(W, H, 90, INT4, dtype=BF16) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("known", [True, False])
def test_without_inputs_the_largest_groups_are_kept_and_rounded_to_nearest(problem, known):
    W, H = problem
    found = quantize_blocks(W, 0 * H if known else None, 90, INT4, dtype=BF16)
    norms = W.view(ROWS, A_ROW, WIDTH).norm(dim=2)
    assert float(norms[found.mask].min()) >= float(norms[~found.mask].max())
    assert torch.equal(
        found.weight(), masked(round_to_nearest(W, INT4, dtype=BF16).weight(), found.mask)
    )
    why = "inputs were all zero" if known else "saw no calibration token"
    assert found.fallback == f"{why}: groups kept by norm, rounded to nearest"


def test_inputs_that_are_always_zero_cost_nothing(problem):
    W, H = problem
    H[:WIDTH], H[:, :WIDTH] = 0, 0
    found = quantize_blocks(W, H, ROWS * (A_ROW - 1), INT4, dtype=BF16)
    assert not found.mask[:, 0].any()
    assert found.fallback is None


def test_impossible_arguments_are_rejected(problem):
    W, H = problem
    for groups in (0, 201):
        sentence = rf"n_blocks must be in \[1, 200\] for a weight \[20, 80\], got {groups}"
        with pytest.raises(ValueError, match=sentence):
            quantize_blocks(W, H, groups, INT4, dtype=BF16)
    with pytest.raises(ValueError, match="not a multiple of the group size 16"):
        quantize_blocks(W[:, :40], None, 3, QuantizationArgs.parse("int4-g16"), dtype=BF16)
    with pytest.raises(ValueError, match=r"must be \[80, 80\], got \[79, 79\]"):
        quantize_blocks(W, H[:79, :79], 3, INT4, dtype=BF16)
    W[0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds infinities or NaN"):
        quantize_blocks(W, H, 3, INT4, dtype=BF16)
