"""Pivot rows and coefficients: lossless, bounded and fast."""

import time

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers.pivot_rows import BOUND, pivot_rows
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import spectrum

SHAPES = [(96, 64, 40), (64, 96, 40), (24, 40, 24), (5, 9, 1), (192, 48, 30), (1, 3, 1)]


def gaussian(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    return B, torch.randn(rank, d_in, generator=g, dtype=torch.float64)


def realistic(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Truncate a weight with a falling spectrum under an input metric of condition 1e6."""
    g = torch.Generator().manual_seed(seed)
    U, V, Q = (
        torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
        for n in (d_out, d_in, d_in)
    )
    size = min(d_out, d_in)
    W = (U[:, :size] / torch.arange(1, size + 1)) @ V[:, :size].T  # [d_out, d_in]
    H = Q * torch.logspace(0, -6, d_in, dtype=torch.float64) @ Q.T  # [d_in, d_in]
    factors = spectrum(W, Moment.of(H)).truncate(rank)
    return factors.B, factors.A


def stubborn(rank: int) -> tuple[Tensor, Tensor]:
    """Make the matrix on which LU with partial pivoting doubles the coefficients at every step."""
    B = torch.full((2 * rank, rank), -1, dtype=torch.float64).tril(-1)
    B.diagonal().fill_(1)
    return B, gaussian(1, 50, rank)[1]


def rebuilt(R: Tensor, C: Tensor, order: Tensor) -> Tensor:
    return torch.cat([R, C @ R])[order]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("factors", [gaussian, realistic])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_coefficients_are_the_product(factors, shape: tuple[int, int, int]) -> None:
    B, A = factors(*shape)
    R, C, order = pivot_rows(B, A)
    assert error(rebuilt(R, C, order), B @ A) <= 1e-10
    assert R.shape == (shape[2], shape[1])
    assert C.shape == (shape[0] - shape[2], shape[2])
    assert not C.numel() or float(C.abs().max()) <= BOUND
    assert order.sort().values.tolist() == list(range(shape[0]))
    pivots = order < shape[2]
    torch.testing.assert_close((B @ A)[pivots], R[order[pivots]], rtol=1e-12, atol=1e-12)
    assert all(bool((order[part].diff() > 0).all()) for part in (pivots, ~pivots))


@pytest.mark.parametrize("rank", [20, 60, 200])
def test_coefficients_stay_bounded_where_elimination_grows(rank: int) -> None:
    B, A = stubborn(rank)
    R, C, order = pivot_rows(B, A)
    assert float(C.abs().max()) <= BOUND
    assert error(rebuilt(R, C, order), B @ A) <= 1e-10


@pytest.mark.parametrize("factors", [gaussian, realistic])
def test_rounding_to_bfloat16_stays_small(factors) -> None:
    B, A = factors(192, 96, 60)
    R, C, order = pivot_rows(B, A)
    rounded = rebuilt(R.bfloat16().double(), C.bfloat16().double(), order)
    assert error(rounded, B @ A) <= 0.015  # measured 0.005 and 0.005
    factors_rounded = B.bfloat16().double() @ A.bfloat16().double()
    assert error(factors_rounded, B @ A) <= 0.005  # measured 0.002 and 0.002


def test_scales_of_columns_and_of_the_whole_do_not_matter() -> None:
    B, A = gaussian(60, 40, 20)
    scale = torch.logspace(-12, 12, 20, dtype=torch.float64)
    for Bs, As in ((B * scale, A / scale[:, None]), (B * 1e-30, A)):
        R, C, order = pivot_rows(Bs, As)
        assert error(rebuilt(R, C, order), Bs @ As) <= 1e-10


def test_results_are_deterministic() -> None:
    first, second = (pivot_rows(*realistic(96, 64, 40)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_modified() -> None:
    B, A = gaussian(20, 10, 5)
    kept = B.clone(), A.clone()
    pivot_rows(B, A)
    assert torch.equal(B, kept[0])
    assert torch.equal(A, kept[1])


def test_factors_of_lower_rank_are_rejected() -> None:
    B, A = gaussian(30, 20, 8)
    B[:, 5] = B[:, :4] @ torch.tensor([1.0, -2, 3, 0.5], dtype=torch.float64)
    B[:, 7] = 0
    with pytest.raises(
        ValueError, match=r"\[30, 8\] must have full column rank, got numerical rank 6"
    ):
        pivot_rows(B, A)
    with pytest.raises(ValueError, match="rank must be at most the number of rows, 5, got 8"):
        pivot_rows(B[:5], A)
    B[3, 3] = torch.nan
    with pytest.raises(ValueError, match="infinities or NaN"):
        pivot_rows(B, A)


@pytest.mark.quiet
def test_a_matrix_takes_little_time() -> None:
    B, A = gaussian(576, 576, 318)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        pivot_rows(B, A)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.5  # measured 0.015 on one idle core
