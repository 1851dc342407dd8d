"""Masks: exact counts, and swaps that pay."""

import pytest
import torch

from lrc.compressors.solvers.masks import (
    drop_and_swap,
    largest,
    largest_of_groups,
    swap_in_groups,
)


def test_the_largest_are_selected_exactly() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert largest(scores, 3).tolist() == [[True, False, False], [False, True, True]]
    assert int(largest(torch.zeros(4, 5), 7).sum()) == 7


@pytest.mark.parametrize("dim", [0, 1])
def test_two_of_every_four_are_selected_and_of_equal_scores_the_earlier(dim: int) -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 9.0])
    expected = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1]).bool()
    both = torch.stack([scores, scores], dim=1 - dim)
    found = largest_of_groups(both, 2, 4, dim)
    assert torch.equal(found, torch.stack([expected, expected], dim=1 - dim))


@pytest.mark.parametrize("count", range(9))
def test_groups_have_their_largest_entries(count: int) -> None:
    scores = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    eights = scores.unflatten(1, (3, 8))
    expected = torch.zeros_like(eights, dtype=torch.bool)
    expected.scatter_(2, eights.topk(count, dim=2).indices, True)
    assert torch.equal(largest_of_groups(scores, count, 8, 1), expected.flatten(1))


def test_entries_are_dropped_then_swapped_where_a_gain_exceeds_a_loss() -> None:
    mask = torch.tensor([True, True, True, True, False, False])
    losses = torch.tensor([1.0, 2.0, 3.0, 9.0, 0.0, 0.0])
    gains = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.5, 8.0])

    def kept(drop: int, swaps: int) -> list[int]:
        changed = drop_and_swap(mask, losses, gains, drop=drop, swaps=swaps)
        return changed.nonzero().flatten().tolist()

    assert kept(0, 0) == [0, 1, 2, 3]
    assert kept(2, 0) == [2, 3]
    assert kept(0, 1) == [1, 2, 3, 5]
    assert kept(0, 2) == [2, 3, 4, 5]
    assert kept(1, 2) == [2, 3, 5]  # 8 for 2 pays, 2.5 for 3 does not
    assert mask.tolist() == [True] * 4 + [False] * 2


def test_groups_exchange_at_most_one_pair_each_where_most_is_gained() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    losses = torch.tensor([[1.0, 2, 0, 0], [5, 0, 1, 0], [0, 3, 9, 0]])
    gains = torch.tensor([[0.0, 0, 7, 9], [0, 2, 0, 1], [2, 0, 0, 3]])

    def swapped(swaps: int) -> list[list[int]]:
        changed = swap_in_groups(mask, losses, gains, size=4, swaps=swaps)
        return changed.int().tolist()

    best = [0, 1, 0, 1]  # 9 for 1; 7 for 2 would pay too
    second = [1, 1, 0, 0]  # 2 for 1
    assert swapped(1) == [best, [1, 0, 1, 0], [0, 1, 1, 0]]
    assert swapped(2) == swapped(99) == [best, second, [0, 1, 1, 0]]  # 3 for 3 does not pay
    for full in (torch.ones_like(mask), torch.zeros_like(mask)):
        assert torch.equal(swap_in_groups(full, losses, gains, size=4, swaps=9), full)
