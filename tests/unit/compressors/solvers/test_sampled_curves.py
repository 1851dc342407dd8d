"""Curves of pruning from a sample of rows, against closed forms and searches at all sizes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers import sampled_curves
from lrc.compressors.solvers.masks import Pattern
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.pruning import prune_curve, prune_curves
from lrc.compressors.solvers.sampled_curves import ROW_STRIDE, sampled_rows

DAMPING = {"damp": 1e-6, "gradient_damp": 1e-2}
D_OUT, D_IN = 512, 64
SIZES = [D_OUT * D_IN * n // 8 for n in (7, 6, 5, 4, 3, 2)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(d: int, seed: int) -> Moment:
    """Second moment with a power-law spectrum."""
    directions = torch.linalg.qr(normal(d, d, seed=seed)).Q
    X = normal(4 * d, d, seed=seed + 1) * torch.arange(1, d + 1).double() ** -0.25 @ directions
    return Moment.of(X.T @ X)


def removed(W: Tensor, sizes: Sequence[int], group: int) -> Tensor:
    """Return the sums of the smallest squares, equally many of every group of entries."""
    squares = W.square().reshape(-1, group).sort(dim=1).values
    return torch.stack([squares[:, : group - n * group // W.numel()].sum() for n in sizes])


@pytest.mark.parametrize("gradients", ["none", "diagonal", "full"])
@pytest.mark.parametrize("pattern", ["unstructured", "n:8"])
def test_without_correlations_a_sample_of_repeated_rows_is_exact(
    pattern: Pattern, gradients: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_curves, "SAMPLED_FROM", 0)
    W = normal(D_OUT // ROW_STRIDE, D_IN, seed=0).repeat_interleave(ROW_STRIDE, 0)
    ones = torch.ones(D_OUT).double()
    H = Moment.of(torch.eye(D_IN).double())
    G = {"none": None, "diagonal": Moment(ones, image=W.T @ W), "full": Moment.of(ones.diag())}
    order = [SIZES[at] for at in (3, 0, 5, 2, 1, 4, 3)]
    curve = prune_curve(W, H, G[gradients], nonzeros=order, pattern=pattern)
    expected = removed(W, order, 8 if pattern == "n:8" else W.numel())
    torch.testing.assert_close(
        torch.tensor(curve, dtype=torch.float64), expected, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("pattern", ["unstructured", "n:8"])
def test_curves_of_a_sample_are_near_those_of_all_rows(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled by the number of rows, the same energies would be 19 to 66 % too high."""
    W, H, G = normal(D_OUT, D_IN, seed=0), correlated(D_IN, 1), correlated(D_OUT, 2)
    found = []
    for sampled_from in (0, D_OUT * D_IN + 1):
        monkeypatch.setattr(sampled_curves, "SAMPLED_FROM", sampled_from)
        curve = prune_curve(W, H, G, nonzeros=SIZES, pattern=pattern, **DAMPING)
        found.append(torch.tensor(curve, dtype=torch.float64))
    sample, every = found
    assert float(sample[0]) == pytest.approx(float(every[0]), rel=1e-12)
    # At most 8 % of five seeds; of larger matrices less.
    torch.testing.assert_close(sample, every, rtol=0.15, atol=0)
    assert not torch.equal(sample, every)


@pytest.mark.parametrize("in_sample", [True, False])
def test_a_weight_that_has_zeros_already_is_searched_as_a_whole(
    in_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the largest size nothing is lost: the ratio to the sample is 0, or not finite."""
    W = normal(D_OUT, D_IN, seed=0)
    W[W.abs() < W.abs().quantile(0.12)] = 0
    rows = torch.arange(D_OUT) % ROW_STRIDE == 0
    if not in_sample:
        W[rows] = normal(int(rows.sum()), D_IN, seed=1)
    sizes = [int((W != 0).sum()), *SIZES[1:]]
    H, G = correlated(D_IN, 1), correlated(D_OUT, 2)
    found = []
    for sampled_from in (0, D_OUT * D_IN + 1):
        monkeypatch.setattr(sampled_curves, "SAMPLED_FROM", sampled_from)
        found.append(prune_curve(W, H, G, nonzeros=sizes, **DAMPING))
    assert found[0] == found[1]
    assert all(energy >= 0 for energy in found[0])


def test_a_sample_unlike_its_weight_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [normal(D_OUT, D_IN, seed=seed) for seed in range(3)]
    weights[1][::ROW_STRIDE, ::2] = 0  # whose first half costs nothing
    weights[2][::ROW_STRIDE] **= 5
    H, G = [correlated(D_IN, 1)] * 3, [correlated(D_OUT, 2)] * 3
    found = []
    for sampled_from in (0, D_OUT * D_IN + 1):
        monkeypatch.setattr(sampled_curves, "SAMPLED_FROM", sampled_from)
        curves = prune_curves(weights, H, G, nonzeros=SIZES, **DAMPING)
        found.append(torch.tensor(curves, dtype=torch.float64))
    sample, every = found
    assert torch.equal(sample[1:], every[1:])
    assert not torch.equal(sample[0], every[0])
    monkeypatch.setattr(sampled_curves, "SAMPLED_FROM", 0)
    alone = prune_curve(weights[0], H[0], G[0], nonzeros=SIZES, **DAMPING)
    # Products of stacks may round differently in float32, in which masks are searched.
    torch.testing.assert_close(
        sample[0], torch.tensor(alone, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_weights_of_eight_million_numbers_are_sampled_for_four_sizes_or_more() -> None:
    assert sampled_rows(4096, 2048, 4) == 512
    assert sampled_rows(4095, 2048, 4) == 0
    assert sampled_rows(4096, 2048, 3) == 0
