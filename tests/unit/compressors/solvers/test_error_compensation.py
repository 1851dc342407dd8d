"""Compensation: the target of a layer after a compressed prefix."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers.error_compensation import refit_target


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*, seed: int = 1) -> Tensor:
    return normal(100, 20, seed=seed) @ normal(20, 20, seed=seed + 50)


@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_the_refitted_target_is_the_least_squares_solution(mix: float) -> None:
    W, X = normal(12, 20, seed=0), tokens()
    behind = X + 0.3 * tokens(seed=7)
    V, fallback = refit_target(W, behind.T @ behind, X.T @ behind, mix=mix, damp=0.0)
    target = (1 - mix) * behind @ W.T + mix * X @ W.T
    expected = torch.linalg.lstsq(behind, target, driver="gelsd").solution.T
    assert fallback is None
    torch.testing.assert_close(V, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_the_deficit_of_the_stream_is_part_of_the_target(mix: float) -> None:
    W, X, stream = normal(12, 20, seed=0), tokens(), normal(100, 12, seed=3)
    behind = X + 0.3 * tokens(seed=7)
    V, fallback = refit_target(
        W,
        behind.T @ behind,
        X.T @ behind,
        mix=mix,
        damp=0.0,
        deficit=stream.T @ behind,
        residual=0.5,
    )
    target = (1 - mix) * behind @ W.T + mix * X @ W.T + 0.5 * stream
    expected = torch.linalg.lstsq(behind, target, driver="gelsd").solution.T
    assert fallback is None
    torch.testing.assert_close(V, expected, rtol=1e-8, atol=1e-8)


def test_nothing_is_refitted_without_mix_or_without_change() -> None:
    W, X = normal(12, 20, seed=0), tokens()
    H = X.T @ X
    assert torch.equal(refit_target(W, H, H, mix=0.0, damp=1e-6)[0], W)
    torch.testing.assert_close(refit_target(W, H, H, mix=0.5, damp=1e-2)[0], W)
    with pytest.raises(ValueError, match="mix must be in"):
        refit_target(W, H, H, mix=1.5, damp=0.0)
    with pytest.raises(ValueError, match="residual must be in"):
        refit_target(W, H, H, mix=0.5, damp=0.0, residual=-1)


def test_refitting_leaves_directions_without_tokens_alone() -> None:
    """Damping pulls towards the weight, not towards zero."""
    W, X = normal(12, 20, seed=0), tokens()
    X[:, 4] = 0
    behind = X + 0.3 * tokens(seed=7)
    behind[:, 4] = 0
    V, fallback = refit_target(W, behind.T @ behind, X.T @ behind, mix=0.5, damp=0.0)
    assert fallback is not None
    assert "damping raised" in fallback
    torch.testing.assert_close(V[:, 4], W[:, 4])
