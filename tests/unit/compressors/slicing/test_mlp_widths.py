"""Channels distributed over layers: all of them, within bounds, by importance."""

import pytest
import torch

from lrc.compressors.slicing.mlp_widths import by_curves, by_influence, evenly

MOST = 12


@pytest.mark.parametrize("steps", range(4, 4 * MOST + 1))
def test_every_step_is_allocated_within_bounds(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    influence = torch.rand(4, generator=generator).tolist()
    curves = [torch.rand(MOST, generator=generator).sort(descending=True).values for _ in range(4)]
    flat = [torch.zeros(MOST) for _ in range(4)]
    for found in (
        evenly(steps, 4),
        by_influence(influence, steps, MOST),
        by_curves(curves, steps),
        by_curves(flat, steps),
    ):
        assert sum(found) == steps
        assert min(found) >= 1
        assert max(found) <= MOST


def test_layers_of_one_influence_keep_as_much() -> None:
    assert by_influence([0.3, 0.3, 0.3], 15, MOST) == [5, 5, 5]


def test_more_influence_keeps_more() -> None:
    found = by_influence([0.1, 0.2, 0.4], 24, MOST)
    assert found == sorted(found)
    assert len(set(found)) == 3


def test_the_fractions_of_the_paper() -> None:
    """Within the bounds, a layer loses L * mean * softmax(-s / epsilon)."""
    influence = torch.tensor([0.1, 0.15, 0.2], dtype=torch.float64)
    gone = 3 * 1000 * 0.2 * torch.softmax(-influence / 0.1, dim=0)
    found = by_influence(influence.tolist(), 2400, 1000)
    assert (1000 - torch.tensor(found) - gone).abs().max() < 1


def test_curves_give_the_least_loss_of_all_splits() -> None:
    steep = torch.tensor([8.0, 4.0, 1.0, 0.0])
    mild = torch.tensor([2.0, 1.0, 0.5, 0.0])
    for steps in range(2, 9):
        best = min(
            float(steep[a - 1] + mild[steps - a - 1]) for a in range(1, 5) if 1 <= steps - a <= 4
        )
        a, b = by_curves([steep, mild], steps)
        assert float(steep[a - 1] + mild[b - 1]) == best
