"""Low-rank corrections against the spectrum of the whitened error."""

import pytest
import torch

from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.low_rank_correction import low_rank_correction


@pytest.mark.parametrize("shape", [(12, 32), (32, 12), (20, 20)])
@pytest.mark.parametrize("kind", ["qera", "eora"])
def test_the_error_is_the_tail_of_the_whitened_spectrum(matrices, shape, kind):
    E, H = matrices(*shape)
    sizes = torch.linalg.svdvals(E @ torch.linalg.cholesky(H))
    for rank in (1, 4, 12):
        L, R = low_rank_correction(E, H, rank, kind)
        assert L.shape == (shape[0], rank)
        assert R.shape == (rank, shape[1])
        tail = float(sizes[rank:].square().sum())
        assert weighted_error(E, L @ R, H) == pytest.approx(tail, rel=1e-8, abs=1e-8 * tail + 1e-6)


@pytest.mark.parametrize("shape", [(12, 32), (32, 12)])
def test_lqer_knows_the_diagonal_alone(matrices, shape):
    E, H = matrices(*shape)
    diagonal = torch.diag(H.diagonal())
    L, R = low_rank_correction(E, H, 4, "lqer")
    torch.testing.assert_close(L @ R, torch.matmul(*low_rank_correction(E, diagonal, 4, "qera")))
    exact = torch.matmul(*low_rank_correction(E, H, 4, "qera"))
    assert weighted_error(E, exact, H) < weighted_error(E, L @ R, H)


@pytest.mark.parametrize("shape", [(12, 32), (32, 12)])
def test_inputs_of_few_directions_are_enough(matrices, shape):
    E, H = matrices(*shape)
    seen = torch.eye(shape[1], 5, dtype=torch.float64)
    H = seen @ H[:5, :5] @ seen.T
    for kind in ("qera", "eora"):
        L, R = low_rank_correction(E, H, 5, kind)
        assert bool(torch.isfinite(L @ R).all())
        assert weighted_error(E, L @ R, H) < 1e-8 * weighted_error(E, 0 * E, H)


def test_without_inputs_every_direction_counts_the_same(matrices):
    E, H = matrices()
    tail = torch.linalg.svdvals(E)[4:].square().sum()
    for kind in ("qera", "eora", "lqer"):
        L, R = low_rank_correction(E, 0 * H, 4, kind)
        assert weighted_error(E, L @ R) == pytest.approx(float(tail))


def test_bad_input_is_rejected(matrices):
    E, H = matrices()
    with pytest.raises(ValueError, match=r"rank must be in \[1, 12\] for a weight .*, got 13"):
        low_rank_correction(E, H, 13)
    with pytest.raises(ValueError, match="kind must be one of qera, eora, lqer, got 'svd'"):
        low_rank_correction(E, H, 4, "svd")
    with pytest.raises(ValueError, match="infinities or NaN"):
        low_rank_correction(E / 0, H, 4)
