"""Masks: exact counts, and swaps that pay."""

import pytest
import torch

from lrc.compressors.solvers.masks import drop_and_swap, largest, two_of_four


def test_the_largest_are_selected_exactly() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert largest(scores, 3).tolist() == [[True, False, False], [False, True, True]]
    assert int(largest(torch.zeros(4, 5), 7).sum()) == 7


@pytest.mark.parametrize("dim", [0, 1])
def test_two_of_every_four_are_selected_and_of_equal_scores_the_earlier(dim: int) -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 9.0])
    expected = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1]).bool()
    both = torch.stack([scores, scores], dim=1 - dim)
    assert torch.equal(two_of_four(both, dim), torch.stack([expected, expected], dim=1 - dim))


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
