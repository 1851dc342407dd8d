"""The choice of channels of an MLP, and the refit of its output linear."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lrc.compressors.slicing.mlp import loss_curve, lost_energy, narrow, refit

DAMP = 1e-10


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def correlated(n: int, d: int, seed: int = 0) -> Tensor:
    """Tokens whose channels share a few strong directions."""
    return random(n, d, seed=seed) * 0.3 + random(n, 6, seed=seed + 1) @ random(6, d, seed=seed + 2)


def lost(W: Tensor, C: Tensor, kept: Tensor, V: Tensor) -> float:
    """Return the energy lost by a weight V on the kept channels only."""
    return lost_energy(W, torch.zeros_like(W).index_copy(1, kept, V), C)


def test_full_width_changes_nothing():
    W, Z = random(8, 20), correlated(200, 20)
    narrowed = narrow(W, Z.T @ Z, 20, damp=1e-2)
    assert narrowed.kept.tolist() == list(range(20))
    assert torch.equal(narrowed.W, W)
    assert narrowed.lost == 0


def test_refit_at_full_width_changes_nothing_whatever_the_damping():
    W, Z = random(8, 20), correlated(200, 20)
    torch.testing.assert_close(refit(W, Z.T @ Z, torch.arange(20), damp=0.5), W)


def test_channels_that_others_can_replace_are_removed_without_loss():
    Z = random(300, 12)
    mixed = Z @ random(12, 12, seed=3)  # exact combinations
    W = random(7, 24, seed=4)
    every = torch.cat([Z, mixed], dim=1)
    narrowed = narrow(W, every.T @ every, 12, damp=DAMP)
    assert narrowed.lost < 1e-12
    expected = every @ W.T
    torch.testing.assert_close(
        every[:, narrowed.kept] @ narrowed.W.T, expected, rtol=1e-5, atol=1e-5
    )


def test_one_of_two_copies_is_kept():
    Z = random(300, 8)
    narrowed = narrow(
        random(5, 16, seed=1), *[torch.cat([Z, Z], 1).T @ torch.cat([Z, Z], 1)], 8, damp=DAMP
    )
    assert sorted(i % 8 for i in narrowed.kept.tolist()) == list(range(8))


def test_refit_is_least_squares_on_the_tokens():
    W, Z = random(8, 20), correlated(200, 20)
    kept = torch.tensor([0, 3, 4, 9, 15])
    expected = torch.linalg.lstsq(Z[:, kept], Z @ W.T).solution.T
    torch.testing.assert_close(refit(W, Z.T @ Z, kept, damp=0.0), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("width", [3, 10, 19])
def test_refit_is_never_worse_than_selection_alone(width):
    W, Z = random(8, 20), correlated(200, 20)
    C = Z.T @ Z
    narrowed = narrow(W, C, width, damp=1e-6)
    assert narrowed.lost <= lost(W, C, narrowed.kept, W[:, narrowed.kept])


def test_lost_energy_is_that_of_the_output():
    W, Z = random(8, 20), correlated(200, 20)
    narrowed = narrow(W, Z.T @ Z, 11, damp=1e-6)
    y = Z @ W.T
    error = (y - Z[:, narrowed.kept] @ narrowed.W.T).square().sum() / y.square().sum()
    assert narrowed.lost == pytest.approx(float(error), rel=1e-9)


def test_the_first_removed_channel_is_the_best_of_all():
    W, Z = random(8, 20), correlated(200, 20)
    C = Z.T @ Z
    narrowed = narrow(W, C, 19, damp=DAMP)
    every = [torch.tensor(kept) for kept in combinations(range(20), 19)]
    best = min(lost(W, C, kept, refit(W, C, kept, damp=DAMP)) for kept in every)
    assert narrowed.lost == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_loses_less_than_ridge_leverage(seed):
    """MoDeGPT and UniQL keep the largest of diag(C (C + r I)^-1)."""
    W, Z = random(16, 96, seed=seed) * torch.rand(96).double(), correlated(800, 96, seed=10 + seed)
    C = Z.T @ Z
    ridge = torch.eye(96).double() * C.diagonal().mean()
    leverage = (C @ torch.linalg.inv(C + ridge)).diagonal()
    kept = leverage.topk(48).indices.sort().values
    theirs = lost(W, C, kept, refit(W, C, kept, damp=1e-6))
    assert narrow(W, C, 48, damp=1e-6).lost < 0.9 * theirs


def test_float32_comes_close_to_float64():
    W, Z = random(8, 64), correlated(500, 64)
    C = Z.T @ Z
    exact, rounded = narrow(W, C, 32, damp=1e-4), narrow(W.float(), C.float(), 32, damp=1e-4)
    assert rounded.lost == pytest.approx(exact.lost, rel=1e-3)


def test_inputs_that_no_token_has_used_keep_the_largest_weights():
    W = torch.ones(3, 6) * torch.arange(6)
    narrowed = narrow(W, torch.zeros(6, 6), 2, damp=1e-4)
    assert narrowed.kept.tolist() == [4, 5]
    assert narrowed.fallback is not None


def test_is_deterministic_and_leaves_its_input():
    W, Z = random(8, 40), correlated(200, 40)
    C = Z.T @ Z
    before = W.clone(), C.clone()
    first, second = narrow(W, C, 13, damp=1e-4), narrow(W, C, 13, damp=1e-4)
    assert torch.equal(first.W, second.W)
    assert torch.equal(W, before[0])
    assert torch.equal(C, before[1])
    assert first.kept.tolist() == sorted(first.kept.tolist())
    assert first.W.shape == (8, 13)


@pytest.mark.parametrize("width", [0, 21])
def test_a_width_out_of_range_is_refused(width):
    with pytest.raises(ValueError, match=r"width must be in \[1, 20\]"):
        narrow(random(8, 20), torch.eye(20), width, damp=1e-4)


def test_a_curve_equals_the_loss_of_narrowing() -> None:
    W, Z = random(8, 40), correlated(300, 40)
    C = Z.T @ Z
    total = float(((W @ C) * W).sum())
    curve = loss_curve(W, C, damp=1e-9)
    assert curve[-1] == 0
    assert bool((curve.diff() <= 0).all())
    for width in (1, 7, 20, 33, 40):
        expected = narrow(W, C, width, damp=1e-9).lost
        assert float(curve[width - 1]) / total == pytest.approx(expected, rel=1e-3, abs=1e-8)
