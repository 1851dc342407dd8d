"""Allocation: identities against brute force over every combination, bounds, and speed."""

import time
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from lrc.compressors.planning.allocators import (
    BudgetError,
    Options,
    heavy_tail,
    lagrangian,
    options_of,
    uniform,
)

SHAPES = [(6, 9), (9, 6), (7, 7), (3, 12)]


def plain(d_out: int, d_in: int):
    return lambda rank: rank * (d_out + d_in)


def pivoted(d_out: int, d_in: int):
    """Cost of pivot storage: concave in the rank, so that losses over costs are not convex."""
    return lambda rank: rank * (d_out + d_in - rank)


COSTS = {"plain": plain, "pivoted": pivoted}


def energies_of(d_out: int, d_in: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = float(10 ** torch.randn(1, generator=g))
    return scale * torch.rand(min(d_out, d_in), generator=g).double().pow(3).sort().values.flip(0)


def some_options(seed: int, cost: str = "plain", **kwargs: float) -> list[Options]:
    return [
        options_of(energies_of(*s, seed * 10 + i), COSTS[cost](*s), s[0] * s[1], **kwargs)
        for i, s in enumerate(SHAPES)
    ]


def totals(options: list[Options], chosen: list[int]) -> tuple[int, float]:
    pairs = list(zip(options, chosen, strict=True))
    return sum(int(o.costs[i]) for o, i in pairs), sum(float(o.losses[i]) for o, i in pairs)


def combinations(options: list[Options]) -> list[tuple[int, float]]:
    """Cost and loss of every combination."""
    return [totals(options, list(c)) for c in product(*(range(len(o.costs)) for o in options))]


def hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Lower convex hull of (cost, loss), by Andrew's monotone chain."""
    result: list[tuple[int, float]] = []
    for x, y in sorted(points):
        if result and y >= result[-1][1]:
            continue
        while len(result) >= 2:
            (x0, y0), (x1, y1) = result[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            result.pop()
        result.append((x, y))
    return result


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("seed", range(4))
def test_at_the_cost_of_any_hull_solution_it_is_the_optimum(cost: str, seed: int) -> None:
    """Everett: what minimises loss + lambda cost is optimal for the cost that it has."""
    options = some_options(seed, cost)
    points = combinations(options)
    for budget, _ in hull(points):
        best = min(loss for c, loss in points if c <= budget)
        spent, loss = totals(options, lagrangian(options, budget))
        assert spent == budget
        assert loss == pytest.approx(best, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_at_most_a_hull_step_better(cost: str, seed: int) -> None:
    options = some_options(seed, cost)
    points = combinations(options)
    steps = hull(points)
    for (low, loss_low), (high, loss_high) in pairwise(steps):
        slope = (loss_low - loss_high) / (high - low)
        for budget in range(low, high, 7):
            spent, loss = totals(options, lagrangian(options, budget))
            assert spent <= budget
            best = min(value for c, value in points if c <= budget)
            dual = loss_low - slope * (budget - low)
            assert dual <= best * (1 + 1e-12)
            assert best * (1 - 1e-12) <= loss <= loss_low * (1 + 1e-12)
            assert loss - best <= loss_low - loss_high + 1e-12


@pytest.mark.parametrize("cost", COSTS)
def test_more_budget_never_gives_more_loss(cost: str) -> None:
    options = some_options(5, cost)
    smallest = sum(int(o.costs[0]) for o in options)
    dense = sum(int(o.costs[-1]) for o in options)
    losses = [totals(options, lagrangian(options, b))[1] for b in range(smallest, dense + 1)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(losses))
    assert losses[-1] == 0


def test_one_matrix_gets_the_best_option_that_fits() -> None:
    """With one matrix the greedy end alone must find what the hull hides."""
    options = [some_options(2, "pivoted")[2]]
    for budget in range(int(options[0].costs[0]), 50):
        index = lagrangian(options, budget)[0]
        assert index == int((options[0].costs <= budget).sum()) - 1


def test_dense_is_chosen_where_it_pays_and_only_there() -> None:
    flat, steep = torch.ones(8).double(), torch.logspace(0, -7, 8).double()
    options = [options_of(e, plain(8, 8), 64) for e in (flat, steep)]
    ranks = [int(o.ranks[i]) for o, i in zip(options, lagrangian(options, 64 + 32), strict=True)]
    assert ranks == [0, 2]


def test_matrices_without_loss_take_the_cheapest_option() -> None:
    free = Options(torch.tensor([1, 0]), torch.tensor([10, 64]), torch.zeros(2).double())
    dear = options_of(torch.ones(8).double(), plain(8, 8), 64)
    assert lagrangian([free, free], 1000) == [0, 0]
    assert lagrangian([free, dear], 10 + 64) == [0, len(dear.costs) - 1]


@pytest.mark.parametrize("scale", [1e-290, 1e-30, 1e30, 1e290])
def test_the_choice_does_not_depend_on_the_unit_of_the_losses(scale: float) -> None:
    options = some_options(3, "pivoted")
    scaled = [Options(o.ranks, o.costs, o.losses * scale) for o in options]
    for budget in (70, 100, 130, 170):
        assert lagrangian(scaled, budget) == lagrangian(options, budget)


def test_matrices_whose_losses_differ_by_thirty_orders_are_both_served() -> None:
    e = torch.linspace(1, 0.1, 8).double()
    options = [options_of(e * 1e15, plain(8, 8), 64), options_of(e * 1e-15, plain(8, 8), 64)]
    assert lagrangian(options, 64 + 48)[0] == len(options[0].costs) - 1
    assert lagrangian(options, 64 + 48)[1] == 2  # rank 3


def test_budgets_out_of_reach_are_refused_with_the_smallest_reachable_cost() -> None:
    options = some_options(1)
    smallest = min(cost for cost, _ in combinations(options))
    with pytest.raises(BudgetError, match=f"must be at least {smallest}") as caught:
        lagrangian(options, smallest - 1)
    assert caught.value.smallest == smallest
    assert totals(options, lagrangian(options, smallest))[0] == smallest


def test_options_respect_multiples_floor_cap_and_dense() -> None:
    energies = torch.tensor([8.0, 4, 2, 1, 1, 1, 1, 1]).double()
    all_ranks = options_of(energies, plain(8, 12), 96)
    assert all_ranks.ranks.tolist() == [1, 2, 3, 4, 0]  # rank 5 would cost 100 of 96
    assert all_ranks.costs.tolist() == [20, 40, 60, 80, 96]
    assert all_ranks.losses.tolist() == [11, 7, 5, 4, 0]
    assert options_of(energies, plain(8, 12), 96, multiple=2).ranks.tolist() == [2, 4, 0]
    assert options_of(energies, plain(8, 12), 96, min_cost=41).ranks.tolist() == [3, 4, 0]
    assert options_of(energies, plain(8, 12), 96, max_loss=0.3).ranks.tolist() == [3, 4, 0]
    assert options_of(energies, plain(8, 12), 96, max_loss=0.01).ranks.tolist() == [0]


def test_options_end_at_the_numerical_rank() -> None:
    energies = torch.tensor([4.0, 1, 1e-16, 0]).double()
    assert options_of(energies, plain(4, 40), 160).ranks.tolist() == [1, 2, 0]
    assert options_of(torch.zeros(4), plain(4, 40), 160).ranks.tolist() == [0]


def test_costs_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Options(torch.tensor([1, 0]), torch.tensor([5, 5]), torch.zeros(2))


@pytest.mark.quiet
def test_a_large_model_of_224_matrices_is_allocated_in_seconds() -> None:
    options = [
        options_of(torch.logspace(0, -4, 4096).double() * (1 + i % 7), pivoted(4096, 4096), 4096**2)
        for i in range(224)
    ]
    budget = int(0.8 * 224 * 4096**2)
    start = time.perf_counter()
    chosen = lagrangian(options, budget)
    # 0.15 s on one core measured; the bound leaves room for a busy machine.
    assert time.perf_counter() - start < 5
    spent, _ = totals(options, chosen)
    assert 0 <= budget - spent < 4096


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_uniform_is_the_largest_multiple_within_its_share(
    cost: str, keep: float, multiple: int
) -> None:
    for d_out, d_in in [(64, 64), (24, 80), (3, 5)]:
        price = COSTS[cost](d_out, d_in)
        fits = [
            rank
            for rank in range(multiple, min(d_out, d_in) + 1, multiple)
            if price(rank) <= keep * d_out * d_in
        ]
        rank = uniform(price, d_out * d_in, keep, min(d_out, d_in), multiple=multiple)
        assert rank == max(fits, default=0)


def slow_heavy_tail(values, shapes, budget, multiple):
    """Try every threshold from below, counting values one by one."""
    normal = [(s - s.min()) / (s.max() - s.min()) for s in values]
    for t in sorted({float(v) for s in normal for v in s}):
        ranks, cost = [], 0
        for s, (m, n) in zip(normal, shapes, strict=True):
            rank = sum(float(v) >= t for v in s)
            while rank % multiple:
                rank += 1
            if rank > min(m, n) or rank * (m + n) >= m * n:
                rank, price = 0, m * n
            else:
                price = rank * (m + n)
            ranks.append(rank)
            cost += price
        if cost <= budget:
            return ranks
    return None


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_heavy_tail_equals_a_slow_scan_of_every_threshold(seed: int, multiple: int) -> None:
    shapes = [(12, 20), (20, 12), (16, 16), (8, 30)]
    values = [energies_of(*s, seed * 10 + i).sqrt() for i, s in enumerate(shapes)]
    dense = [m * n for m, n in shapes]
    for budget in range(134 * multiple, sum(dense) + 1, 23):
        ranks = heavy_tail(
            values, [plain(*s) for s in shapes], dense, budget, multiple=multiple
        )  # fmt: skip
        assert ranks == slow_heavy_tail(values, shapes, budget, multiple)


def test_heavy_tail_keeps_flat_matrices_dense_and_cuts_those_with_a_tail() -> None:
    flat, tail = torch.linspace(1, 0.9, 16).double().sqrt(), torch.logspace(0, -3, 16).double()
    flat[-1] = 0
    ranks = heavy_tail([flat, tail], [plain(16, 16)] * 2, [256] * 2, 400)
    assert ranks[0] == 0
    assert 0 < ranks[1] < 8


def test_heavy_tail_refuses_what_rank_one_cannot_reach() -> None:
    values = [torch.linspace(1, 0, 8).double()] * 2
    with pytest.raises(BudgetError) as caught:
        heavy_tail(values, [plain(8, 8)] * 2, [64] * 2, 31)
    assert caught.value.smallest == 32
    equal = [torch.ones(8).double()]
    assert heavy_tail(equal, [plain(8, 8)], [64], 64) == [0]
