"""Choose one candidate per weight within a budget.

Allocators know costs and losses only. Dense weights are a candidate like any other: the most
expensive one, without loss.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Steps of the bisection, on a logarithmic scale of 2^200: enough to tell slopes apart that differ
# in the last digits of float64 (200 / 2^64 < 2^-52).
BISECTIONS = 64
SLOPE_RANGE = 2.0**-200

Table = tuple[Tensor, Tensor]
"""Costs [n] int64 and losses [n] float64 of the candidates of one weight."""


class BudgetError(ValueError):
    """The budget is below the cost of the cheapest candidates; `smallest` is that cost."""

    def __init__(self, budget: int, smallest: int) -> None:
        super().__init__(
            f"the budget must be at least {smallest}, the cost of the cheapest candidates, "
            f"got {budget}; raise the budget or lower the floors"
        )
        self.smallest = smallest


class Priced(Protocol):
    """The attributes of a candidate that an allocator reads."""

    @property
    def cost(self) -> int:
        """Bits or multiply-adds."""

    @property
    def loss(self) -> float:
        """In a unit common to all weights."""


def lagrangian(candidates: Sequence[Sequence[Priced]], budget: int) -> list[int]:
    """Choose a candidate for every weight: the least total loss within a total cost.

    Parameters
    ----------
    candidates : sequence of sequence of Candidate
        One sequence per weight, with strictly increasing costs.
    budget : int
        Upper limit of the total cost.

    Returns
    -------
    list of int
        Index of the chosen candidate of every weight.

    Raises
    ------
    BudgetError
        If the cheapest candidates together exceed the budget.
    ValueError
        If costs do not increase.

    Notes
    -----
    For a multiplier lambda every weight separately minimizes ``loss + lambda * cost``. The result
    is optimal for the cost that it has [1]_; lambda is bisected to the smallest multiplier that
    stays within the budget. Only candidates on the lower convex hull of a weight can be chosen this
    way; what the last hull step leaves of the budget is spent greedily on any candidate that fits,
    largest reduction of loss per cost first. The optimum is at most that one hull step better, and
    a larger budget never gives a larger loss.

    References
    ----------
    .. [1] H. Everett, "Generalized Lagrange multiplier method for solving problems of optimum
       allocation of resources", Operations Research 11 (1963).
    """
    tables = [_table(each) for each in candidates]
    smallest = sum(int(costs[0]) for costs, _ in tables)
    if smallest > budget:
        raise BudgetError(budget, smallest)
    if not tables:
        return []
    chosen = _hull_choice(tables, budget)
    spent = sum(int(costs[i]) for (costs, _), i in zip(tables, chosen, strict=True))
    return _spend(tables, chosen, budget - spent)


def _table(candidates: Sequence[Priced]) -> Table:
    costs = torch.tensor([c.cost for c in candidates])
    if not bool((costs.diff() > 0).all()):
        raise ValueError("the costs of candidates must increase strictly")
    return costs, torch.tensor([c.loss for c in candidates], dtype=torch.float64)


def heavy_tail(candidates: Sequence[Sequence[Priced]], budget: int) -> list[int]:
    """Choose the cheapest candidates whose loss is below a common threshold.

    Parameters
    ----------
    candidates : sequence of sequence of Candidate
        One sequence per weight, with increasing costs and dense last. The loss of a rank is the
        largest singular value that it removes, normalized by ``(s - min) / (max - min)``.
    budget : int
        Upper limit of the total cost.

    Returns
    -------
    list of int
        Index of the chosen candidate of every weight, at the lowest threshold within the budget.

    Raises
    ------
    BudgetError
        If even the threshold 1, at which only the largest values remain, exceeds the budget.

    Notes
    -----
    Weights with a heavy tail of small singular values are cut deeply, flat ones hardly, and no data
    is needed. [1]_ keeps dense what would keep more than half of its rank; here the cost decides.
    The paper searches a grid of thresholds; here all relevant thresholds are considered.

    References
    ----------
    .. [1] A. Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge
       from Low-Rank Gradients", 2024. https://arxiv.org/abs/2407.11239
    """

    def choose(threshold: float) -> list[int]:
        return [
            next((i for i, c in enumerate(each) if c.loss < threshold), len(each) - 1)
            for each in candidates
        ]

    def total(choice: list[int]) -> int:
        return sum(each[i].cost for each, i in zip(candidates, choice, strict=True))

    thresholds = sorted({c.loss for each in candidates for c in each if c.loss < 1} | {1.0})
    smallest = total(choose(1.0))
    if smallest > budget:
        raise BudgetError(budget, smallest)
    # Costs decrease as the threshold increases, so their negatives increase.
    first = bisect_left(thresholds, -budget, key=lambda t: -total(choose(t)))
    return choose(thresholds[first])


def _hull_choice(tables: Sequence[Table], budget: int) -> list[int]:
    """Find the best choice within the budget that some multiplier gives."""
    # Losses are nats or squared activations: in units of the largest, no multiplier underflows.
    unit = max(float(losses.max()) for _, losses in tables) or 1.0
    costs = pad_sequence([costs.double() for costs, _ in tables], batch_first=True)
    losses = pad_sequence([losses / unit for _, losses in tables], True, torch.inf)

    def choose(multiplier: float) -> Tensor:
        # Of equal sums the first, which is the cheapest: argmin's documented choice.
        return torch.add(losses, costs, alpha=multiplier).argmin(dim=1)  # [n_weights]

    def cost(choice: Tensor) -> int:
        return int(costs.gather(1, choice[:, None]).sum())

    free = choose(0.0)
    if cost(free) <= budget:
        return free.tolist()
    # At twice the steepest slope every weight chooses its cheapest candidate.
    slopes = (losses[:, :1] - losses) / (costs - costs[:, :1]).clamp_min(1)
    high = 2 * float(slopes.max())
    best, low = choose(high), high * SLOPE_RANGE
    for _ in range(BISECTIONS):
        middle = low**0.5 * high**0.5
        choice = choose(middle)
        if cost(choice) <= budget:
            best, high = choice, middle
        else:
            low = middle
    return best.tolist()


def _spend(tables: Sequence[Table], chosen: list[int], left: int) -> list[int]:
    """Spend what is left of the budget on the upgrades that gain most per cost."""
    chosen = list(chosen)
    queue: list[tuple[float, int, int]] = []

    def offer(row: int) -> None:
        (costs, losses), now = tables[row], chosen[row]
        end = int(torch.searchsorted(costs, costs[now] + left, right=True))
        if end <= now + 1:
            return
        gains = losses[now] - losses[now + 1 : end]
        rates = gains / (costs[now + 1 : end] - costs[now])
        best = int(rates.argmax())
        if rates[best] > 0:
            heapq.heappush(queue, (-float(rates[best]), row, now + 1 + best))

    for row in range(len(tables)):
        offer(row)
    while queue:
        # An offer made with more left is an upper bound: if it still fits, it is the best of all.
        _, row, better = heapq.heappop(queue)
        costs, _ = tables[row]
        price = int(costs[better] - costs[chosen[row]])
        if price <= left:
            chosen[row] = better
            left -= price
        offer(row)
    return chosen
