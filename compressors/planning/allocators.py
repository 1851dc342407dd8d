"""From one budget for many matrices to a rank for each.

Knows numbers only: what a rank costs (bits in the file, multiply-adds) is a function that the
caller passes. Dense is an option like any other: the dearest, and without loss.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import numerical_rank

Cost = Callable[[int], int]
"""What factors of a rank cost; grows with the rank."""

# Steps of the bisection, on a logarithmic scale of 2^200: enough to tell slopes apart that differ
# in the last digits of float64 (200 / 2^64 < 2^-52).
BISECTIONS = 64
SLOPE_RANGE = 2.0**-200


class BudgetError(ValueError):
    """The budget is below what the cheapest options cost; `smallest` is that cost."""

    def __init__(self, budget: int, smallest: int) -> None:
        super().__init__(
            f"the budget must be at least {smallest}, the cost of the cheapest options, "
            f"got {budget}; raise the budget or lower the floors"
        )
        self.smallest = smallest


@dataclass(frozen=True)
class Options:
    """What can be done with one matrix, by ascending cost; dense comes last and loses nothing.

    Raises
    ------
    ValueError
        If the costs do not ascend strictly.
    """

    ranks: Tensor
    """[n_options] int64; 0 stands for dense."""
    costs: Tensor
    """[n_options] int64, bits or multiply-adds."""
    losses: Tensor
    """[n_options] float64."""

    def __post_init__(self) -> None:
        if not bool((self.costs.diff() > 0).all()):
            raise ValueError("the costs of options must ascend strictly")

    @classmethod
    def of(
        cls, ranks: list[int], costs: list[int], losses: list[float], dense_cost: int
    ) -> "Options":
        """Put dense behind what factors cost and lose."""
        return cls(
            torch.tensor([*ranks, 0]),
            torch.tensor([*costs, dense_cost]),
            torch.tensor([*losses, 0.0], dtype=torch.float64),
        )


def options_of(
    energies: Tensor,
    cost: Cost,
    dense_cost: int,
    *,
    multiple: int = 1,
    min_cost: float = 0,
    max_loss: float = 1.0,
) -> Options:
    """List the ranks of one matrix that are worth considering.

    Parameters
    ----------
    energies : Tensor, shape [min(d_out, d_in)]
        Squared singular values, largest first. The loss of a rank is the sum of those beyond it:
        scale them so that losses of different matrices compare.
    cost : callable
        Cost of factors of a rank.
    dense_cost : int
        Cost of the matrix as it is. Factors have to be cheaper.
    multiple : int
        Ranks are multiples of it, and at most the numerical rank of the matrix.
    min_cost : float
        Floor: cheaper factors are left out.
    max_loss : float
        Cap: factors that lose a larger share of all energy are left out.

    Returns
    -------
    Options
        Dense alone where no factors qualify.
    """
    energies = energies.double().cpu()
    tails = energies.flip(0).cumsum(0).flip(0)  # tails[r] is lost at rank r
    tails = torch.cat([tails, tails.new_zeros(1)])  # [min(d_out, d_in) + 1]
    lost = tails.tolist()
    ranks, costs = [], []
    for rank in range(multiple, numerical_rank(energies) + 1, multiple):
        price = cost(rank)
        if price >= dense_cost:
            break
        if price >= min_cost and lost[rank] <= max_loss * lost[0]:
            ranks.append(rank)
            costs.append(price)
    return Options.of(ranks, costs, [lost[rank] for rank in ranks], dense_cost)


def lagrangian(options: Sequence[Options], budget: int) -> list[int]:
    """Choose an option for every matrix: the least summed loss within a summed cost.

    Parameters
    ----------
    options : sequence of Options
        One a matrix; losses in one unit.
    budget : int
        Upper limit of the summed cost.

    Returns
    -------
    list of int
        Index of the chosen option of every matrix.

    Raises
    ------
    BudgetError
        If the cheapest options together exceed the budget.

    Notes
    -----
    For a multiplier lambda every matrix alone minimises ``loss + lambda * cost``. The result is
    optimal for the cost that it has [1]_; lambda is bisected to the cheapest multiplier that
    stays within the budget. Only options on the lower convex hull of a matrix can be chosen so;
    what the last hull step leaves of the budget is spent greedily on any option that fits, best
    reduction of loss per cost first. The optimum is at most that one hull step better, and more
    budget never gives more loss.

    References
    ----------
    .. [1] H. Everett, "Generalized Lagrange multiplier method for solving problems of optimum
       allocation of resources", Operations Research 11 (1963).
    """
    smallest = sum(int(o.costs[0]) for o in options)
    if smallest > budget:
        raise BudgetError(budget, smallest)
    chosen = _hull_choice(options, budget)
    spent = sum(int(o.costs[i]) for o, i in zip(options, chosen, strict=True))
    return _spend(options, chosen, budget - spent)


def uniform(cost: Cost, dense_cost: int, keep: float, max_rank: int, *, multiple: int = 1) -> int:
    """Return the largest rank that costs at most `keep` of the dense matrix; 0 if none.

    Parameters
    ----------
    cost : callable
        Cost of factors of a rank.
    dense_cost : int
        Cost of the matrix as it is.
    keep : float
        Share of it that factors may cost, in (0, 1].
    max_rank : int
        The largest rank there is: the shorter side of the weight.
    multiple : int
        The rank is a multiple of it.
    """
    steps = range(1, max_rank // multiple + 1)
    return multiple * bisect_right(steps, keep * dense_cost, key=lambda k: cost(k * multiple))


def smallest_rank(cost: Cost, floor: float, max_rank: int, *, multiple: int = 1) -> int:
    """Return the smallest multiple of `multiple` that costs at least `floor`; 0 if none."""
    steps = range(1, max_rank // multiple + 1)
    index = bisect_left(steps, floor, key=lambda k: cost(k * multiple))
    return steps[index] * multiple if index < len(steps) else 0


def heavy_tail(
    singular_values: Sequence[Tensor],
    costs: Sequence[Cost],
    dense_costs: Sequence[int],
    budget: int,
    *,
    multiple: int = 1,
    min_costs: Sequence[float] | None = None,
) -> list[int]:
    """Choose ranks by one threshold for all matrices on their normalised singular values.

    Normalised is ``(s - min) / (max - min)``. The rank of a matrix is the number of values at or
    above the threshold: matrices with a heavy tail are cut deeply, flat ones hardly. Needs no data.

    Parameters
    ----------
    singular_values : sequence of Tensor, each of shape [min(d_out, d_in)]
        Largest first.
    costs : sequence of callable
        Cost of factors of a rank, for every matrix.
    dense_costs : sequence of int
        Cost of every matrix as it is; one whose factors would cost as much stays dense.
    budget : int
        Upper limit of the summed cost.
    multiple : int
        Ranks are rounded up to a multiple of it.
    min_costs : sequence of float, optional
        Floors: a rank that costs less is raised to the first that does not.

    Returns
    -------
    list of int
        Rank of every matrix, 0 for dense, at the lowest threshold that fits.

    Raises
    ------
    BudgetError
        If even the threshold 1, which leaves the largest value alone, exceeds the budget.

    Notes
    -----
    [1]_ keeps dense what would keep more than half of its rank; here the cost decides. The paper
    searches a grid of thresholds; the candidates here are the values themselves.

    References
    ----------
    .. [1] A. Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge
       from Low-Rank Gradients", 2024. https://arxiv.org/abs/2407.11239
    """
    ascending = [_normalised(s.double().cpu()).flip(0).tolist() for s in singular_values]
    floors = [
        smallest_rank(cost, floor, len(values), multiple=multiple) or len(values) + 1
        for values, cost, floor in zip(ascending, costs, min_costs or [0] * len(costs), strict=True)
    ]

    def ranks_at(threshold: float) -> list[int]:
        ranks = []
        for values, cost, dense, least in zip(ascending, costs, dense_costs, floors, strict=True):
            at_least = len(values) - bisect_left(values, threshold)
            rank = max(-(-at_least // multiple) * multiple, least)
            ranks.append(rank if rank <= len(values) and cost(rank) < dense else 0)
        return ranks

    def total(ranks: list[int]) -> int:
        priced = zip(ranks, costs, dense_costs, strict=True)
        return sum(cost(rank) if rank else dense for rank, cost, dense in priced)

    thresholds = sorted(set().union(*ascending))  # the last is 1
    smallest = total(ranks_at(thresholds[-1]))
    if smallest > budget:
        raise BudgetError(budget, smallest)
    # Costs fall as the threshold rises, so their negatives ascend.
    first = bisect_left(thresholds, -budget, key=lambda t: -total(ranks_at(t)))
    return ranks_at(thresholds[first])


def _normalised(s: Tensor) -> Tensor:
    low, high = s[-1], s[0]
    # All values equal: there is no tail to cut.
    return (s - low) / (high - low) if high > low else torch.ones_like(s)


def _hull_choice(options: Sequence[Options], budget: int) -> list[int]:
    """Find the best choice within the budget that some multiplier gives."""
    widest = max(len(o.costs) for o in options)
    # Losses are nats or squared activations: in units of the largest, no multiplier underflows.
    unit = max(float(o.losses.max()) for o in options) or 1.0
    losses = torch.full((len(options), widest), torch.inf, dtype=torch.float64)
    costs = torch.zeros(len(options), widest, dtype=torch.float64)
    for row, o in enumerate(options):
        losses[row, : len(o.losses)] = o.losses / unit
        costs[row, : len(o.costs)] = o.costs.double()

    def choose(multiplier: float) -> Tensor:
        # Of equal sums the first, the cheapest: argmin's documented choice.
        return torch.add(losses, costs, alpha=multiplier).argmin(dim=1)  # [n_matrices]

    def cost(choice: Tensor) -> int:
        return int(costs.gather(1, choice[:, None]).sum())

    free = choose(0.0)
    if cost(free) <= budget:
        return _ints(free)
    # At twice the steepest slope from its first option every matrix chooses the cheapest.
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
    return _ints(best)


def _spend(options: Sequence[Options], chosen: list[int], left: int) -> list[int]:
    """Spend what is left of the budget on the upgrades that gain most per cost."""
    chosen = list(chosen)
    queue: list[tuple[float, int, int]] = []

    def offer(matrix: int) -> None:
        o, now = options[matrix], chosen[matrix]
        end = int(torch.searchsorted(o.costs, o.costs[now] + left, right=True))
        if end <= now + 1:
            return
        gains = o.losses[now] - o.losses[now + 1 : end]
        rates = gains / (o.costs[now + 1 : end] - o.costs[now])
        best = int(rates.argmax())
        if rates[best] > 0:
            heapq.heappush(queue, (-float(rates[best]), matrix, now + 1 + best))

    for matrix in range(len(options)):
        offer(matrix)
    while queue:
        # An offer made with more left is an upper bound: if it still fits, it is the best of all.
        _, matrix, better = heapq.heappop(queue)
        price = int(options[matrix].costs[better] - options[matrix].costs[chosen[matrix]])
        if price <= left:
            chosen[matrix] = better
            left -= price
        offer(matrix)
    return chosen


def _ints(choice: Tensor) -> list[int]:
    return [int(index) for index in choice]
