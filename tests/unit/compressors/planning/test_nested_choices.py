"""Choices for several budgets of one checkpoint: each can be cut from the one before."""

from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch

from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.planning.allocators import BudgetError, lagrangian
from lrc.compressors.planning.elastic import nested_choices, with_budgets


@dataclass(frozen=True)
class Priced:
    cost: int
    loss: float


def weight(energies: list[float], price: int, dense: int) -> list[Priced]:
    """Return the candidates of a weight: every rank that is cheaper than dense, dense last."""
    found = []
    for rank in range(1, len(energies) + 1):
        if rank * price < dense:
            found.append(Priced(rank * price, sum(energies[rank:])))
    return [*found, Priced(dense, 0.0)]


def random_weights(seed: int, n: int = 12) -> list[list[Priced]]:
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for _ in range(n):
        decay = 0.3 + 0.65 * torch.rand((), generator=generator)
        scale = 10 ** torch.randn((), generator=generator)
        energies = (scale * decay ** torch.arange(10.0)).tolist()
        price = int(torch.randint(8, 14, (), generator=generator))
        weights.append(weight(energies, price, 80))
    return weights


def losses(weights: list[list[Priced]], choices: list[list[int]]) -> list[float]:
    return [sum(weights[row][i].loss for row, i in enumerate(each)) for each in choices]


@pytest.mark.parametrize("seed", range(8))
def test_choices_are_nested_and_within_their_budgets(seed: int) -> None:
    weights = random_weights(seed)
    dense = [len(each) - 1 for each in weights]
    budgets = [int(keep * 80 * len(weights)) for keep in (0.9, 0.8, 0.6, 0.4)]
    choices = nested_choices(weights, budgets)
    assert len(choices) == len(budgets)
    for budget, chosen in zip(budgets, choices, strict=True):
        assert sum(weights[row][i].cost for row, i in enumerate(chosen)) <= budget
    for larger, smaller in pairwise(choices):
        for row, (high, low) in enumerate(zip(larger, smaller, strict=True)):
            assert low <= high
            assert (high == dense[row]) == (low == dense[row])


def test_the_total_loss_is_close_to_that_of_all_nested_choices() -> None:
    weights = random_weights(1, n=3)
    budgets = [200, 130]
    best = min(
        sum(losses(weights, [list(high), list(low)]))
        for high, low in product(product(*(range(len(each)) for each in weights)), repeat=2)
        if all(
            sum(weights[row][i].cost for row, i in enumerate(each)) <= budget
            for each, budget in zip((high, low), budgets, strict=True)
        )
        and all(
            b <= a and (a == len(each) - 1) == (b == len(each) - 1)
            for each, a, b in zip(weights, high, low, strict=True)
        )
    )
    assert best <= sum(losses(weights, nested_choices(weights, budgets))) <= 1.05 * best


@pytest.mark.parametrize("seed", range(4))
def test_one_set_of_dense_weights_serves_all_budgets(seed: int) -> None:
    weights = random_weights(seed)
    budgets = [int(keep * 80 * len(weights)) for keep in (0.9, 0.5)]
    found = sum(losses(weights, nested_choices(weights, budgets)))
    separate = sum(losses(weights, [lagrangian(weights, each) for each in budgets]))
    none_dense = [each[:-1] for each in weights]
    factors = sum(losses(weights, [lagrangian(none_dense, each) for each in budgets]))
    assert separate <= found <= 1.02 * factors


def test_a_weight_that_can_only_be_dense_is_dense_at_all_budgets() -> None:
    weights = [[Priced(80, 0.0)], weight([5.0, 3.0, 1.0], 20, 80)]
    assert nested_choices(weights, [150, 125]) == [[0, 2], [0, 1]]


def test_a_budget_below_the_cheapest_candidates_is_refused() -> None:
    weights = random_weights(0)
    smallest = sum(each[0].cost for each in weights)
    with pytest.raises(BudgetError) as caught:
        nested_choices(weights, [10 * smallest, smallest - 1])
    assert caught.value.smallest == smallest


def low_rank(rank: int) -> WeightConfig:
    return WeightConfig((20, 30), (ComponentConfig("low_rank", {"rank": rank}),))


def test_the_ranks_of_a_weight_never_increase() -> None:
    config = with_budgets([low_rank(8), low_rank(5), low_rank(6), low_rank(2)])
    assert config is not None
    assert config.components[0].ranks == (8, 5, 5, 2)
    assert [config.at_budget(i).sizes["rank"] for i in range(4)] == [8, 5, 5, 2]
    assert not config.at_budget(2).elastic
    assert WeightConfig.from_json(config.to_json()) == config
    assert config.stored_bits(16) == low_rank(8).stored_bits(16)


def test_a_weight_is_dense_at_all_budgets_or_at_none() -> None:
    dense = WeightConfig((20, 30))
    assert with_budgets([dense, dense]) == dense
    assert with_budgets([dense, low_rank(3)]) is None
    assert with_budgets([low_rank(3), dense]) is None


@pytest.mark.parametrize(
    "ranks", [[7, 3], [8, 9], [8, 0], [8, 2.0], [8, True], "8", [], {"0.9": 8}]
)
def test_ranks_in_a_config_are_checked(ranks: object) -> None:
    record = low_rank(8).to_json()
    record["components"][0]["ranks"] = ranks
    with pytest.raises(ValueError, match="'ranks' must be whole numbers >= 1 that start with"):
        WeightConfig.from_json(record)


def test_only_plain_factors_have_ranks() -> None:
    record = low_rank(8).to_json()
    for change, words in (
        ({"type": "pivoted_low_rank"}, "a pivoted_low_rank component has no 'ranks'"),
        ({"quantization": "int8-g4"}, "'ranks' must be left out"),
        ({"quantization": "int8-asymmetric"}, "'ranks' must be left out"),
        ({"shares": "other"}, "'ranks' must be left out"),
    ):
        changed = {**record, "components": [{**record["components"][0], "ranks": [8, 4], **change}]}
        with pytest.raises(ValueError, match=words):
            WeightConfig.from_json(changed)


def test_a_rank_that_is_lowered_limits_all_budgets() -> None:
    config = ComponentConfig("low_rank", {"rank": 8}, ranks=(8, 5, 2)).with_rank(4)
    assert (config.sizes, config.ranks) == ({"rank": 4}, (4, 4, 2))
