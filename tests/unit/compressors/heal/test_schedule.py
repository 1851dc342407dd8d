import pytest
import torch

from lrc.compressors.heal.schedule import batch_rows, learning_rate


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 150, 2000])
def test_the_rate_rises_to_its_limit_and_falls_to_nearly_zero(steps: int) -> None:
    rates = [learning_rate(step, steps, 0.5) for step in range(steps)]
    top = rates.index(0.5)
    assert max(rates) == 0.5
    assert min(rates) > 0 or steps == 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if steps > 100:
        assert rates[-1] < 1e-3


def test_every_window_is_used_once_before_any_is_used_again() -> None:
    drawn = torch.cat([batch_rows(step, n_windows=7, batch=3, seed=5) for step in range(14)])
    for epoch in drawn.view(6, 7):
        assert sorted(epoch.tolist()) == [*range(7)]
    assert not torch.equal(drawn[:7], drawn[7:14])


def test_a_batch_depends_on_its_number_and_the_seed_only() -> None:
    first = batch_rows(11, n_windows=7, batch=3, seed=5)
    torch.manual_seed(1)
    assert torch.equal(first, batch_rows(11, n_windows=7, batch=3, seed=5))
    others = [batch_rows(11, n_windows=700, batch=3, seed=seed) for seed in range(2)]
    assert not torch.equal(*others)
