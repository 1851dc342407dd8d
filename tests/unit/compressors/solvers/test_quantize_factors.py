"""Quantized factors: balancing keeps the product, and each factor compensates for the other."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.pivot_rows import pivot_rows
from lrc.compressors.solvers import factor_refit
from lrc.compressors.solvers.factor_balancing import balanced_factors
from lrc.compressors.solvers.factor_refit import (
    REFIT_DAMP,
    compensation_target,
    refit_left,
    refit_right,
)
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.quantize_factors import quantize_low_rank, quantize_pivoted
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.compressors.solvers.spectrum import spectrum

INT4 = QuantizationArgs.parse("int4-g8")
BF16 = torch.bfloat16


@pytest.fixture
def pair(matrices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make a weight [40, 32], factors of rank 16, and the second moment of its inputs."""
    W, H = matrices(rows=40)
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    return W, U[:, :16] * s[:16], V[:16], H


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_balancing_leaves_the_product_alone(pair, dtype, rounding):
    _, B, A, H = pair
    product = (B @ A).to(dtype)
    # Balancing rotates and scales what the metric's Cholesky factor has whitened.
    in_float64 = rounding(32, condition=float(torch.linalg.cond(H)) ** 0.5)
    bound = rounding(16, dtype) + in_float64
    for left, right in balanced_factors(B, A, H).values():
        found = left.to(dtype) @ right.to(dtype)
        assert float((found - product).norm() / product.norm()) < bound


def test_balances_share_the_singular_values_by_their_exponents(pair, rounding):
    _, B, A, H = pair
    ways = balanced_factors(B, A, H)
    energies = torch.linalg.eigvalsh(torch.linalg.qr(B).R @ A @ H @ A.T @ torch.linalg.qr(B).R.T)
    sizes = energies.flip(0).sqrt()
    for name, share in {"first": 0.0, "quarter": 0.25, "even": 0.5}.items():
        left, right = ways[name]
        for found, power in ((left.T @ left, 2 * share), (right @ H @ right.T, 2 - 2 * share)):
            expected = torch.diag(sizes**power)
            # Squares of the smallest singular value are off by a share of those of the largest.
            close = rounding(32, condition=float((sizes[0] / sizes[-1]) ** 2))
            close *= float(expected.max())
            torch.testing.assert_close(found, expected, rtol=0, atol=close)


def test_rotations_come_from_the_seed(pair):
    _, B, A, H = pair
    first, again, other = (balanced_factors(B, A, H, seed=seed)["rotated"][1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_factor_of_lower_rank_is_accepted(pair):
    W, B, A, H = pair
    B = torch.cat([B[:, :8], B[:, :8]], dim=1)
    for left, right in balanced_factors(B, A, H).values():
        torch.testing.assert_close(left @ right, B @ A)
    assert quantize_low_rank(W, B, A, 0 * H, INT4, dtype=BF16).error == 0


def test_refitting_is_least_squares_and_never_raises_the_error(pair, rounding):
    W, B, A, H = pair
    rounded = round_to_nearest(A, INT4, dtype=BF16).weight()
    L = torch.linalg.cholesky(H)
    best = torch.linalg.lstsq((rounded @ L).T, (W @ L).T).solution.T
    found, seen = refit_left(W, B, rounded, H)
    condition = float(torch.linalg.cond(seen))
    exact = rounding(32, condition=condition) * float(best.norm())
    assert float((refit_left(W, B, rounded, H, 0.0)[0] - best).norm()) < exact
    pull = REFIT_DAMP * condition * float((best - B).norm())  # of the damping, towards B
    assert float((found - best).norm()) < pull + exact
    torch.testing.assert_close(seen, rounded @ H @ rounded.T)
    for damp in (1e-8, 1e-2, 1.0):
        again = refit_left(W, B, rounded, H, damp)[0]
        assert weighted_error(W, again @ rounded, H) < weighted_error(W, B @ rounded, H)


def test_the_first_factor_is_refitted_alike(pair, rounding, monkeypatch):
    W, B, A, _ = pair
    rounded = round_to_nearest(B, INT4, dtype=BF16).weight()
    best = torch.linalg.lstsq(rounded, W).solution
    condition = float(torch.linalg.cond(rounded.T @ rounded))
    close = rounding(40, condition=condition) * float(best.norm())
    pull = REFIT_DAMP * condition * float((best - A).norm())
    assert float((refit_right(W, rounded, A) - best).norm()) < close + pull
    monkeypatch.setattr(factor_refit, "REFIT_DAMP", 0.0)
    assert float((refit_right(W, rounded, A) - best).norm()) < close


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_the_reported_error_is_that_of_the_rounded_product(pair, quantizer):
    W, B, A, H = pair
    G = torch.diag(torch.arange(40) + 1.0).double()
    found = quantize_low_rank(W, B, A, H, INT4, dtype=BF16, quantizer=quantizer, G=G)
    error = weighted_error(W, found.b.weight() @ found.a.weight(), H, G)
    assert found.error == pytest.approx(error)
    assert set(found.errors) == set(balanced_factors(B, A, H))
    assert found.balance == min(found.errors, key=lambda name: found.errors[name])


def test_rounding_a_pair_beats_rounding_its_factors_alone(pair):
    W, B, A, H = pair
    left, right = balanced_factors(B, A, H)["even"]
    alone = (
        round_to_nearest(left, INT4, dtype=BF16).weight()
        @ round_to_nearest(right, INT4, dtype=BF16, H=H).weight()
    )
    found = quantize_low_rank(W, B, A, H, INT4, dtype=BF16, balance="even")
    assert found.errors == {}
    assert found.error < 0.8 * weighted_error(W, alone, H)


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_coefficients_correct_the_rounding_error_of_pivot_rows(matrices, rank):
    W, H = matrices(rows=32)
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    R, C, order = pivot_rows(U[:, :rank] * s[:rank], V[:rank])
    found = quantize_pivoted(W, R, C, order, H, INT4, dtype=BF16)
    assert (found.c is None) == (rank == 32)
    assert found.error == pytest.approx(weighted_error(W, found.weight(), H))
    rows = round_to_nearest(R, INT4, dtype=BF16, H=H).weight()
    others = round_to_nearest(C, INT4, dtype=BF16).weight() @ rows if len(C) else C @ rows
    assert found.error < weighted_error(W, torch.cat([rows, others])[order], H)


def test_more_rounds_are_never_worse(pair):
    W, B, A, H = pair
    errors = [
        quantize_low_rank(W, B, A, H, INT4, dtype=BF16, balance="even", rounds=rounds).error
        for rounds in (1, 2, 3)
    ]
    assert errors[0] >= errors[1] >= errors[2]


def test_unknown_options_are_rejected(pair):
    W, B, A, H = pair
    with pytest.raises(ValueError, match="balance must be measured or one of first"):
        quantize_low_rank(W, B, A, H, INT4, dtype=BF16, balance="last")
    with pytest.raises(ValueError, match="quantizer must be rtn or gptq, got 'awq'"):
        quantize_low_rank(W, B, A, H, INT4, dtype=BF16, quantizer="awq")


@pytest.fixture
def correlated(matrices) -> tuple[Tensor, Tensor, Tensor]:
    """Make a weight [24, 32], and the moments of its inputs and of its output gradients."""
    W, H = matrices(rows=24)
    _, G = matrices(rows=1, columns=24)
    return W, H, G


def test_under_a_metric_of_the_outputs_the_first_factor_is_weighted_least_squares(
    correlated, rounding, monkeypatch
):
    W, _, G = correlated
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    B, A = round_to_nearest(U[:, :8] * s[:8], INT4, dtype=BF16).weight(), V[:8]
    K = torch.linalg.cholesky(G)
    best = torch.linalg.lstsq(K.T @ B, K.T @ W).solution
    condition = float(torch.linalg.cond(B.T @ G @ B))
    close = rounding(24, condition=condition) * float(best.norm())
    pull = REFIT_DAMP * condition * float((best - A).norm())
    assert float((refit_right(W, B, A, G) - best).norm()) < close + pull
    monkeypatch.setattr(factor_refit, "REFIT_DAMP", 0.0)
    assert float((refit_right(W, B, A, G) - best).norm()) < close


def test_free_rows_compensate_for_the_error_of_fixed_rows(correlated):
    W, H, G = correlated
    E = torch.zeros_like(W)
    E[:8] = W[:8] - round_to_nearest(W[:8], INT4, dtype=BF16).weight()
    E[8:] = -compensation_target(E[:8], G, 8)
    slope = (G @ E @ H)[8:]  # of tr(G E H E^T) / 2 at the rows that are free
    assert float(slope.norm()) < 1e-6 * float((G @ W @ H).norm())
    assert compensation_target(E[:8], None, 8) == 0


def test_under_a_metric_of_the_outputs_balanced_factors_are_orthogonal_under_it(
    correlated, rounding
):
    W, H, G = correlated
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    left = U[:, :8] * s[:8]
    condition = float(torch.linalg.cond(left.T @ G @ left))
    close = rounding(24, condition=condition) + 8 * REFIT_DAMP * condition
    for name, (B, A) in balanced_factors(left, V[:8], H, G).items():
        torch.testing.assert_close(B @ A, left @ V[:8])
        if name != "rotated":
            seen = B.T @ G @ B
            across = seen - torch.diag(seen.diagonal())
            # Whitened under a metric that is damped: the identity, up to that over the metric.
            whitened = across / seen.diagonal().outer(seen.diagonal()).sqrt()
            assert float(whitened.norm()) < close


@pytest.mark.parametrize("kind", ["low_rank", "pivoted_low_rank"])
def test_eight_bits_keep_what_was_found_under_both_metrics(correlated, kind):
    """Refitting under the inputs alone would undo the choice that the gradients made."""
    W, H, G = correlated
    eights = QuantizationArgs.parse("int8-g8")
    factors = spectrum(W, Moment.of(H), Moment.of(G)).truncate(8)
    B, A = factors.B, factors.A
    before = weighted_error(W, B @ A, H, G)
    if kind == "low_rank":
        found = quantize_low_rank(W, B, A, H, eights, dtype=BF16, G=G).error
        without = quantize_low_rank(W, B, A, H, eights, dtype=BF16)
        without = weighted_error(W, without.b.weight() @ without.a.weight(), H, G)
    else:
        parts = pivot_rows(B, A)
        found = quantize_pivoted(W, *parts, H, eights, dtype=BF16, G=G).error
        without = weighted_error(
            W, quantize_pivoted(W, *parts, H, eights, dtype=BF16).weight(), H, G
        )
    assert found < 1.02 * before
    assert found < without
