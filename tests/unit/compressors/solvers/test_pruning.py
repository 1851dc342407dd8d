"""Pruning under two metrics: identities, exact least squares, and every mask of a tiny weight."""

from itertools import combinations, pairwise, product

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.masked_least_squares import (
    Metric,
    compensated_error,
    masked_least_squares,
)
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.pruning import Saliency, prune, prune_curve, prune_curves

DAMPING = {"damp": 1e-6, "gradient_damp": 1e-4}


def weight(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(
        d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def correlated(d: int, seed: int = 1) -> Tensor:
    """Second moment of tokens with a power-law spectrum and channels that differ in scale."""
    directions = torch.linalg.qr(weight(d, d, seed)).Q
    X = weight(400, d, seed + 1) * torch.arange(1, d + 1).double() ** -0.5 @ directions
    X = X * torch.logspace(-1, 1, d, dtype=torch.float64)
    return X.T @ X


def case(d_out: int = 24, d_in: int = 40) -> tuple[Tensor, Moment, Moment]:
    W = weight(d_out, d_in)
    return W, Moment.of(correlated(d_in)), Moment.of(correlated(d_out, seed=5))


def diagonal_of(G: Moment, W: Tensor) -> Moment:
    """Give the moment as a wide side accumulates it: no whole matrix."""
    return Moment(G.diagonal, image=W.T @ G.whole() @ W)


def exact_refit(W: Tensor, H: Tensor, G: Tensor, mask: Tensor) -> Tensor:
    """Masked least squares by the whole Kronecker matrix."""
    kept = mask.flatten()
    A = torch.kron(G, H)
    W_hat = torch.zeros_like(W).flatten()
    W_hat[kept] = torch.linalg.solve(A[kept][:, kept], (A @ W.flatten())[kept])
    return W_hat.view(W.shape)


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "second-order"])
@pytest.mark.parametrize("nonzeros", [1, 7, 500, 959, 960])
def test_as_many_entries_are_kept_as_asked_for(saliency: Saliency, nonzeros: int) -> None:
    W, H, G = case()
    sparse = prune(W, H, G, nonzeros=nonzeros, saliency=saliency, **DAMPING)
    assert sparse.mask.sum() == nonzeros
    assert torch.equal(sparse.W_hat != 0, sparse.mask)
    assert 0 <= sparse.relative_error <= 1
    if nonzeros == W.numel():
        assert torch.equal(sparse.W_hat, W)
        assert sparse.energy == 0


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "second-order"])
def test_two_of_four_inputs_are_kept(saliency: Saliency) -> None:
    W, H, G = case()
    sparse = prune(W, H, G, pattern="2:4", saliency=saliency, **DAMPING)
    assert (sparse.mask.view(24, 10, 4).sum(2) == 2).all()
    assert torch.equal(sparse.W_hat != 0, sparse.mask)


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "second-order"])
@pytest.mark.parametrize("n", range(1, 9))
def test_equally_many_of_every_eight_inputs_are_kept(saliency: Saliency, n: int) -> None:
    W, H, G = case()
    sparse = prune(W, H, G, nonzeros=n * 120, pattern="n:8", saliency=saliency, **DAMPING)
    assert (sparse.mask.view(24, 5, 8).sum(2) == n).all()
    assert torch.equal(sparse.W_hat != 0, sparse.mask)
    if n == 8:
        assert torch.equal(sparse.W_hat, W)
        assert sparse.energy == 0


@pytest.mark.parametrize("nonzeros", [240, 250])
def test_wanda_equals_a_plain_loop_over_rows(nonzeros: int) -> None:
    W, H, G = case()
    sparse = prune(W, H, G, nonzeros=nonzeros, saliency="wanda")
    expected = torch.zeros_like(W)
    next_best = []
    for i in range(24):
        scores = [abs(float(W[i, j])) * float(H.diagonal[j]) ** 0.5 for j in range(40)]
        order = sorted(range(40), key=lambda j: -scores[j])
        for j in order[:10]:
            expected[i, j] = W[i, j]
        next_best.append((scores[order[10]], i, order[10]))
    for _, i, j in sorted(next_best, reverse=True)[: nonzeros - 240]:
        expected[i, j] = W[i, j]
    assert torch.equal(sparse.W_hat, expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "n:8"])
@pytest.mark.parametrize("given", [False, True])
def test_without_correlations_the_largest_entries_stay_as_they_are(
    pattern: str, given: bool
) -> None:
    W = weight(24, 40)
    eyes = [Moment.of(torch.eye(d).double()) if given else None for d in (40, 24)]
    budget = {"unstructured": {"nonzeros": 500}, "2:4": {}, "n:8": {"nonzeros": 600}}[pattern]
    second = prune(W, *eyes, pattern=pattern, **budget)
    plain = prune(W, pattern=pattern, saliency="magnitude", **budget)
    assert torch.equal(second.mask, plain.mask)
    torch.testing.assert_close(second.W_hat, plain.W_hat, rtol=1e-10, atol=0)
    assert second.energy == pytest.approx(float((W - plain.W_hat).square().sum()), rel=1e-10)


@pytest.mark.parametrize("whole", [False, True])
def test_energy_is_the_weighted_error_under_damped_metrics(whole: bool) -> None:
    W, H, G = case()
    seen = G if whole else diagonal_of(G, W)
    sparse = prune(W, H, seen, nonzeros=500, damp=1e-2, gradient_damp=1e-1)
    metrics = (
        damped(H.whole(), 1e-2),
        damped(G.whole() if whole else G.diagonal.diag(), 1e-1),
    )
    assert sparse.energy == pytest.approx(weighted_error(W, sparse.W_hat, *metrics), rel=1e-9)
    total = weighted_error(W, torch.zeros_like(W), *metrics)
    assert sparse.relative_error == pytest.approx(sparse.energy / total, rel=1e-9)


def test_refit_of_rows_equals_lstsq() -> None:
    """With the diagonal of G, every output is a least-squares problem of its own."""
    W, H, G = case(12, 20)
    mask = prune(W, H, nonzeros=120).mask
    metric = Metric(H.whole(), G.diagonal)
    X = masked_least_squares(W, metric, mask, torch.zeros_like(W), steps=400)
    inverse, _ = metric.inverse(0.0, torch.float64)
    _, error = compensated_error(W, inverse, mask, torch.zeros_like(W), steps=400)
    L = torch.linalg.cholesky(H.whole())
    for i in range(12):
        kept = mask[i]
        solved = torch.linalg.lstsq(L.T[:, kept], L.T @ W[i]).solution
        torch.testing.assert_close(X[i, kept], solved, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close((W - error)[i, kept], solved, rtol=1e-8, atol=1e-8)
    assert (X[~mask] == 0).all()


def test_refit_under_a_whole_gradient_moment_equals_the_kronecker_solve() -> None:
    W, H, G = case(6, 8)
    mask = prune(W, H, G, nonzeros=25).mask
    metric = Metric(H.whole(), G.whole())
    expected = exact_refit(W, H.whole(), G.whole(), mask)
    X = masked_least_squares(W, metric, mask, torch.zeros_like(W), steps=200)
    torch.testing.assert_close(X, expected, rtol=1e-7, atol=1e-8)
    inverse, _ = metric.inverse(0.0, torch.float64)
    multipliers, error = compensated_error(W, inverse, mask, torch.zeros_like(W), steps=200)
    torch.testing.assert_close(W - error, expected, rtol=1e-7, atol=1e-8)
    moved = metric(error)
    torch.testing.assert_close(multipliers, moved, rtol=0, atol=1e-8 * float(moved.abs().max()))


def test_every_step_of_the_refit_lowers_the_error() -> None:
    W, H, G = case()
    metric = Metric(H.whole(), G.whole())
    mask = prune(W, H, G, nonzeros=500).mask
    errors = [
        float(metric.energy(W - masked_least_squares(W, metric, mask, W, steps=steps)))
        for steps in range(12)
    ]
    assert errors == sorted(errors, reverse=True)


def test_what_prune_returns_is_near_the_exact_refit_of_its_mask() -> None:
    W, H, G = case(16, 24)
    sparse = prune(W, H, G, nonzeros=200)
    exact = exact_refit(W, H.whole(), G.whole(), sparse.mask)
    best = weighted_error(W, exact, H.whole(), G.whole())
    assert best <= sparse.energy < 1.02 * best  # 1.0026 measured


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("whole", [False, True])
def test_more_work_and_better_criteria_lose_less(shape: tuple[int, int], whole: bool) -> None:
    W, H, G = case(*shape)
    gradients = G if whole else diagonal_of(G, W)
    energies = [
        prune(W, H, gradients, nonzeros=600, saliency=saliency, **DAMPING).energy
        for saliency in ("second-order", "wanda", "magnitude")
    ]
    assert energies == sorted(energies)
    assert energies[0] < 0.5 * energies[1]
    searched = [
        prune(W, H, gradients, nonzeros=600, rounds=rounds, **DAMPING).energy for rounds in range(7)
    ]
    # Each search keeps its best; how far the last steps get differs from mask to mask.
    assert all(b <= 1.01 * a for a, b in pairwise(searched))  # 1.0034 measured
    assert searched[-1] < searched[0]


def test_swaps_beat_exact_least_squares_on_the_first_mask() -> None:
    """One shot as in SparseGPT at its best: saliency of the inverse, then the exact optimum."""
    W, H, G = case()
    H_inverse, G_inverse = (torch.linalg.inv(M.whole()).diagonal() for M in (H, G))
    saliency = W.square() / H_inverse / G_inverse[:, None]
    mask = saliency >= saliency.flatten().topk(500).values[-1]
    exact = exact_refit(W, H.whole(), G.whole(), mask)
    one_shot = weighted_error(W, exact, H.whole(), G.whole())
    assert prune(W, H, G, nonzeros=500).energy < 0.9 * one_shot


def test_a_sparse_weight_is_recovered() -> None:
    W, H, G = case()
    planted = W * (weight(24, 40, seed=9).abs() > 0.7)
    nonzeros = int((planted != 0).sum())
    sparse = prune(planted, H, G, nonzeros=nonzeros, **DAMPING)
    assert torch.equal(sparse.mask, planted != 0)
    torch.testing.assert_close(sparse.W_hat, planted, rtol=1e-12, atol=0)
    assert sparse.relative_error < 1e-20


@pytest.mark.parametrize("d_out", [1, 2])
def test_no_mask_of_a_tiny_weight_does_better(d_out: int) -> None:
    """Local swaps do not promise the optimum; on these seeds they find it."""
    ratios = []
    for seed in range(8):
        d_in, nonzeros = (6, 3) if d_out == 1 else (4, 4)
        W = weight(d_out, d_in, seed)
        H, G = correlated(d_in, seed + 20), correlated(d_out, seed + 40)
        best = float("inf")
        for kept in combinations(range(W.numel()), nonzeros):
            mask = torch.zeros(W.numel(), dtype=torch.bool)
            mask[list(kept)] = True
            exact = exact_refit(W, H, G, mask.view(W.shape))
            best = min(best, weighted_error(W, exact, H, G))
        ratios.append(prune(W, Moment.of(H), Moment.of(G), nonzeros=nonzeros).energy / best)
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) < 1.01  # 1.0000 measured


@pytest.mark.parametrize("n", range(1, 8))
def test_under_diagonal_metrics_no_other_places_in_a_group_of_eight_do_better(n: int) -> None:
    """Without correlations nothing is refitted, and every group is a problem of its own."""
    W, diagonals = weight(3, 16), [weight(1, d, seed=7)[0].square() for d in (16, 3)]
    H, G = (Moment.of(d.diag()) for d in diagonals)
    sparse = prune(W, H, G, nonzeros=n * 6, pattern="n:8")
    cost = W.square() * diagonals[0] * diagonals[1][:, None]
    removed = torch.zeros(3, 2, dtype=torch.float64)
    for i, group in [(i, group) for i in range(3) for group in range(2)]:
        eight = cost[i, 8 * group : 8 * group + 8].tolist()
        removed[i, group] = min(sum(left) for left in combinations(eight, 8 - n))
    assert sparse.energy == pytest.approx(float(removed.sum()), rel=1e-9)
    assert torch.equal(sparse.W_hat, W * sparse.mask)


@pytest.mark.parametrize("d_out", [1, 2])
def test_no_places_in_the_groups_of_a_tiny_weight_do_better(d_out: int) -> None:
    """Local swaps do not promise the optimum; on these seeds they come close to it."""
    ratios, n = [], 4
    for seed in range(6):
        W = weight(d_out, 8, seed)
        H, G = correlated(8, seed + 20), correlated(d_out, seed + 40)
        best = float("inf")
        for rows in product(combinations(range(8), n), repeat=d_out):
            mask = torch.zeros(d_out, 8, dtype=torch.bool)
            for i, kept in enumerate(rows):
                mask[i, list(kept)] = True
            best = min(best, weighted_error(W, exact_refit(W, H, G, mask), H, G))
        found = prune(W, Moment.of(H), Moment.of(G), nonzeros=n * d_out, pattern="n:8")
        ratios.append(found.energy / best)
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) < 1.05  # 1.029 measured


@pytest.mark.parametrize("saliency", ["magnitude", "second-order"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_pattern_costs_as_much_as_it_forbids(saliency: Saliency, shape: tuple[int, int]) -> None:
    """Any places are among the best, those of 4:8 next, those of 2:4, a part of them, last."""
    for seed in range(4):
        W, half = weight(*shape, seed), shape[0] * shape[1] // 2
        H, G = (Moment.of(correlated(d, seed + d)) for d in reversed(shape))
        # The metric of magnitudes is the identity: under it, each mask is the best there is.
        metrics = () if saliency == "magnitude" else (H, G)
        found = [
            prune(W, *metrics, saliency=saliency, **arguments).energy
            for arguments in (
                {"nonzeros": half},
                {"nonzeros": half, "pattern": "n:8"},
                {"pattern": "2:4"},
            )
        ]
        assert found == sorted(found)
        assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "second-order"])
def test_a_curve_of_n_of_eight_is_that_of_prune(saliency: Saliency) -> None:
    W, H, G = case()
    budgets = [n * 120 for n in (7, 6, 5, 4, 3, 2, 1)]
    curve = prune_curve(W, H, G, nonzeros=budgets, pattern="n:8", saliency=saliency, **DAMPING)
    assert curve == sorted(curve)
    for budget, energy in zip(budgets, curve, strict=True):
        alone = prune(W, H, G, nonzeros=budget, pattern="n:8", saliency=saliency, **DAMPING).energy
        assert energy == pytest.approx(alone, rel=0.2 if saliency == "second-order" else 1e-12)


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "second-order"])
def test_a_curve_is_that_of_prune(saliency: Saliency) -> None:
    W, H, G = case()
    budgets = [500, 800, 650, 500]
    curve = prune_curve(W, H, G, nonzeros=budgets, saliency=saliency, **DAMPING)
    assert curve[0] == curve[3]
    for budget, energy in zip(budgets, curve, strict=True):
        alone = prune(W, H, G, nonzeros=budget, saliency=saliency, **DAMPING).energy
        assert energy == pytest.approx(alone, rel=0.2 if saliency == "second-order" else 1e-12)


def test_swaps_that_gain_nothing_are_not_made() -> None:
    """More swaps asked for than useful: the count and the mask of a lossless weight stay."""
    W, H, G = case()
    planted = W * (weight(24, 40, seed=9).abs() > 0.7)
    sparse = prune(planted, H, G, nonzeros=955, rounds=12)
    assert sparse.mask.sum() == 955
    assert sparse.relative_error < 1e-20


def test_dead_channels_lose_nothing() -> None:
    W, H, G = case()
    full = H.whole().clone()
    full[3:13] = 0
    full[:, 3:13] = 0
    sparse = prune(W, Moment.of(full), G, nonzeros=24 * 30)
    assert torch.isfinite(sparse.W_hat).all()
    assert not sparse.mask[:, 3:13].any()
    assert sparse.relative_error < 1e-20


def test_moments_that_saw_nothing_are_left_out_and_said() -> None:
    W, H, _ = case()
    sparse = prune(W, Moment.of(torch.zeros(40, 40)), Moment.of(torch.zeros(24, 24)), nonzeros=400)
    assert sparse.fallback == (
        "inputs were all zero; left out of the metric; "
        "gradients were all zero; left out of the metric"
    )
    assert torch.equal(sparse.mask, prune(W, nonzeros=400).mask)
    assert prune(W, H, nonzeros=400).fallback is None


def test_arguments_are_left_alone_and_bfloat16_will_do() -> None:
    W, H, G = case()
    low = W.bfloat16()
    before = low.clone(), H.full.clone(), G.full.clone()
    sparse = prune(low, H, G, nonzeros=500)
    assert sparse.W_hat.dtype == torch.float64
    for a, b in zip(before, (low, H.full, G.full), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nonzeros is required with pattern unstructured, got None"),
        ({"nonzeros": 0}, r"nonzeros must be in \[1, 132\] for a weight \[6, 22\], got 0"),
        ({"nonzeros": 133}, r"nonzeros must be in \[1, 132\] for a weight \[6, 22\], got 133"),
        ({"nonzeros": 9, "pattern": "2:4"}, "must be omitted with pattern 2:4, got 9"),
        ({"pattern": "2:4"}, r"groups of 4, got a weight \[6, 22\]; use 'unstructured'"),
        (
            {"nonzeros": 9, "pattern": "4:8"},
            "pattern must be one of unstructured, 2:4, n:8, got '4:8'",
        ),
        ({"nonzeros": 66, "pattern": "n:8"}, r"groups of 8, got a weight \[6, 22\]; use 'unst"),
        ({"nonzeros": 9, "saliency": "best"}, "saliency must be one of magnitude, wanda"),
    ],
)
def test_arguments_that_make_no_sense_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(weight(6, 22), **arguments)


def test_n_of_eight_needs_a_number_for_equal_groups() -> None:
    with pytest.raises(ValueError, match="nonzeros is required with pattern n:8, got None"):
        prune(weight(6, 24), pattern="n:8")
    words = "nonzeros must be a multiple of 18, the number of groups, with pattern n:8, got 70"
    with pytest.raises(ValueError, match=words):
        prune(weight(6, 24), nonzeros=70, pattern="n:8")
    with pytest.raises(ValueError, match=r"nonzeros must be in \[1, 144\]"):
        prune(weight(6, 24), nonzeros=9 * 18, pattern="n:8")


def test_a_curve_rejects_what_prune_rejects() -> None:
    with pytest.raises(ValueError, match=r"nonzeros must be in \[1, 132\]"):
        prune_curve(weight(6, 22), nonzeros=[9, 133])


@pytest.mark.parametrize("rounds", [2, 8])
@pytest.mark.parametrize("pattern", ["unstructured", "n:8"])
def test_curves_of_several_weights_equal_those_of_each_alone(pattern: str, rounds: int) -> None:
    weights = [weight(24, 40, seed) for seed in range(4)]
    weights[1] *= weight(24, 40, seed=9).abs() > 1  # for which the search ends early
    weights[2].zero_()
    inputs = [Moment.of(correlated(40, seed)) for seed in range(10, 14)]
    gradients = [Moment.of(correlated(24, seed)) for seed in range(30, 34)]
    options = {"nonzeros": [480, 720, 240], "pattern": pattern, "rounds": rounds, **DAMPING}
    several = prune_curves(weights, inputs, gradients, **options)
    alone = [
        prune_curve(W, H, G, **options) for W, H, G in zip(weights, inputs, gradients, strict=True)
    ]
    # Products of stacks may round differently in float32, in which masks are searched.
    torch.testing.assert_close(torch.tensor(several), torch.tensor(alone), rtol=1e-3, atol=1e-12)
    assert several[2] == [0.0, 0.0, 0.0]
    # Without whole matrices of all gradients, each is solved alone.
    gradients[3] = diagonal_of(gradients[3], weights[3])
    mixed = prune_curves(weights, inputs, gradients, **options)
    assert mixed[3] == prune_curve(weights[3], inputs[3], gradients[3], **options)
