"""Allocation: identities against brute force over every combination, bounds, and speed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers import WeightConfig
from lrc.compressors.planning.allocators import BudgetError, heavy_tail, lagrangian
from lrc.compressors.planning.candidates import Candidate, tail_candidates
from lrc.compressors.planning.measures import MACS
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.tasks import LayerTask, Weight

SHAPES = [(6, 9), (9, 6), (7, 7), (3, 12)]


@dataclass(frozen=True)
class Option:
    """A rank, its cost and its loss; rank 0 stands for the dense weight."""

    rank: int
    cost: int
    loss: float


Options = list[Option]


def options_of(energies: Tensor, price: Callable[[int], int], dense: int) -> Options:
    """Return the ranks that are cheaper than the dense weight, and the dense weight."""
    lost = [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    ranks = [rank for rank in range(1, len(energies) + 1) if price(rank) < dense]
    return [*(Option(rank, price(rank), lost[rank]) for rank in ranks), Option(0, dense, 0.0)]


def plain(d_out: int, d_in: int) -> Callable[[int], int]:
    return lambda rank: rank * (d_out + d_in)


def pivoted(d_out: int, d_in: int) -> Callable[[int], int]:
    """Cost of pivot rows: concave in the rank, so that losses over costs are not convex."""
    return lambda rank: rank * (d_out + d_in - rank)


COSTS = {"plain": plain, "pivoted": pivoted}


def energies_of(d_out: int, d_in: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = float(10 ** torch.randn(1, generator=g))
    return scale * torch.rand(min(d_out, d_in), generator=g).double().pow(3).sort().values.flip(0)


def some_options(seed: int, cost: str = "plain") -> list[Options]:
    return [
        options_of(energies_of(*s, seed * 10 + i), COSTS[cost](*s), s[0] * s[1])
        for i, s in enumerate(SHAPES)
    ]


def totals(options: Sequence[Options], chosen: Sequence[int]) -> tuple[int, float]:
    picked = [each[i] for each, i in zip(options, chosen, strict=True)]
    return sum(o.cost for o in picked), sum(o.loss for o in picked)


def combinations(options: list[Options]) -> list[tuple[int, float]]:
    """Return cost and loss of every combination."""
    return [totals(options, c) for c in product(*(range(len(each)) for each in options))]


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
    """Everett: what minimizes loss + lambda cost is optimal for the cost that it has."""
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
    smallest = sum(each[0].cost for each in options)
    dense = sum(each[-1].cost for each in options)
    losses = [totals(options, lagrangian(options, b))[1] for b in range(smallest, dense + 1)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(losses))
    assert losses[-1] == 0


def test_one_weight_gets_the_best_candidate_that_fits() -> None:
    """With one weight the greedy end alone must find what the hull hides."""
    options = [some_options(2, "pivoted")[2]]
    for budget in range(options[0][0].cost, 50):
        index = lagrangian(options, budget)[0]
        assert index == sum(o.cost <= budget for o in options[0]) - 1


def test_dense_is_chosen_where_it_pays_and_only_there() -> None:
    flat, steep = torch.ones(8).double(), torch.logspace(0, -7, 8).double()
    options = [options_of(e, plain(8, 8), 64) for e in (flat, steep)]
    ranks = [o[i].rank for o, i in zip(options, lagrangian(options, 64 + 32), strict=True)]
    assert ranks == [0, 2]


def test_weights_without_loss_take_the_cheapest_candidate() -> None:
    free = [Option(1, 10, 0.0), Option(0, 64, 0.0)]
    dear = options_of(torch.ones(8).double(), plain(8, 8), 64)
    assert lagrangian([free, free], 1000) == [0, 0]
    assert lagrangian([free, dear], 10 + 64) == [0, len(dear) - 1]


@pytest.mark.parametrize("scale", [1e-290, 1e-30, 1e30, 1e290])
def test_the_choice_does_not_depend_on_the_unit_of_the_losses(scale: float) -> None:
    options = some_options(3, "pivoted")
    scaled = [[replace(o, loss=o.loss * scale) for o in each] for each in options]
    for budget in (70, 100, 130, 170):
        assert lagrangian(scaled, budget) == lagrangian(options, budget)


def test_weights_whose_losses_differ_by_thirty_orders_both_get_a_part_of_the_budget() -> None:
    e = torch.linspace(1, 0.1, 8).double()
    options = [options_of(e * 1e15, plain(8, 8), 64), options_of(e * 1e-15, plain(8, 8), 64)]
    assert lagrangian(options, 64 + 48)[0] == len(options[0]) - 1
    assert lagrangian(options, 64 + 48)[1] == 2  # rank 3


def test_unreachable_budgets_are_rejected_with_the_smallest_reachable_cost() -> None:
    options = some_options(1)
    smallest = min(cost for cost, _ in combinations(options))
    with pytest.raises(BudgetError, match=f"must be at least {smallest}") as caught:
        lagrangian(options, smallest - 1)
    assert caught.value.smallest == smallest
    assert totals(options, lagrangian(options, smallest))[0] == smallest


def test_costs_that_do_not_increase_are_rejected() -> None:
    with pytest.raises(ValueError, match="increase strictly"):
        lagrangian([[Option(1, 5, 0.0), Option(0, 5, 0.0)]], 10)


def test_anything_with_cost_and_loss_is_a_candidate() -> None:
    """An allocator reads cost and loss; candidates of the planner have both."""
    dense = WeightConfig((8, 8))
    found = [[Candidate(dense, o.cost, o.loss) for o in each] for each in some_options(1)]
    assert lagrangian(found, 150) == lagrangian(some_options(1), 150)


@pytest.mark.quiet
def test_a_large_model_of_224_weights_is_allocated_in_seconds() -> None:
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


def tails(energies: Tensor, d_out: int, d_in: int, multiple: int = 1) -> list[Candidate]:
    """Return the candidates of a weight, priced in multiply-adds."""
    task = LayerTask(
        weights=(Weight("w", 0),),
        config=WeightConfig((d_out, d_in)),
        number_bits=16,
        stage=0,
        method="svd",
        types="low_rank",
    )
    allocation = Allocation(0, "heavy-tail", 0, MACS, ("low_rank",), rank_multiple=multiple)
    return tail_candidates(task, Curve(energies, 0), allocation)


def tail_ranks(candidates: Sequence[Sequence[Candidate]], budget: int) -> list[int]:
    """Return the ranks that are chosen; 0 for dense."""
    chosen = heavy_tail(candidates, budget)
    return [c[i].config.sizes.get("rank", 0) for c, i in zip(candidates, chosen, strict=True)]


def slow_heavy_tail(
    values: list[Tensor], shapes: list[tuple[int, int]], budget: int, multiple: int
) -> list[int] | None:
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
    energies = [energies_of(*s, seed * 10 + i) for i, s in enumerate(shapes)]
    values = [e.sqrt() for e in energies]
    offered = [tails(e, *s, multiple) for e, s in zip(energies, shapes, strict=True)]
    for budget in range(134 * multiple, sum(m * n for m, n in shapes) + 1, 23):
        ranks = tail_ranks(offered, budget)
        assert ranks == slow_heavy_tail(values, shapes, budget, multiple)


def test_heavy_tail_keeps_flat_weights_dense_and_cuts_those_with_a_tail() -> None:
    flat, tail = torch.linspace(1, 0.9, 16).double().sqrt(), torch.logspace(0, -3, 16).double()
    flat[-1] = 0
    ranks = tail_ranks([tails(values**2, 16, 16) for values in (flat, tail)], 400)
    assert ranks[0] == 0
    assert 0 < ranks[1] < 8


def test_heavy_tail_rejects_budgets_below_rank_one() -> None:
    values = torch.linspace(1, 0, 8).double()
    with pytest.raises(BudgetError) as caught:
        heavy_tail([tails(values**2, 8, 8)] * 2, 31)
    assert caught.value.smallest == 32
    assert tail_ranks([tails(torch.ones(8).double(), 8, 8)], 64) == [0]
