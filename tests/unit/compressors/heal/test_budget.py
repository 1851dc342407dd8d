from itertools import pairwise

import pytest

from lrc.compressors.heal.budget import JUDGEMENTS, StepBudget, TimeBudget
from lrc.compressors.heal.schedule import learning_rate


class Clock:
    """Time that passes only when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def train(budget: TimeBudget, clock: Clock, durations: list[float], done: int = 0) -> list[float]:
    """Make steps until the budget is used; return their learning rates."""
    rates = []
    while done < budget.total(done):
        rates.append(learning_rate(done, budget.total(done), 1.0))
        clock.now += durations[min(done, len(durations) - 1)]
        budget.advance()
        done += 1
    return rates


@pytest.mark.parametrize("steps", [1, 5, 10, 99, 150])
def test_the_last_step_is_judged(steps: int) -> None:
    budget = StepBudget(steps)
    judged = [done for done in range(1, steps + 1) if budget.is_judged(done)]
    assert judged[-1] == steps
    assert min(steps, JUDGEMENTS) <= len(judged) <= 2 * JUDGEMENTS


@pytest.mark.parametrize(
    "durations",
    [[1.0], [9.0, 1.0], [2.0] * 20 + [1.0], [1.0] * 40 + [2.0], [1.0, 0.5, 1.5] * 100],
    ids=["even", "slow start", "faster", "slower", "uneven"],
)
def test_the_rate_falls_to_zero_when_the_time_ends(durations: list[float]) -> None:
    clock = Clock()
    rates = train(TimeBudget(100.0, clock=clock), clock, durations)
    assert 90.0 < clock.now - 1000.0 <= 102.0
    assert max(rates) > 0.99
    assert rates[-1] < 0.01
    top = rates.index(max(rates))
    assert all(after <= before + 0.02 for before, after in pairwise(rates[top:]))


def test_a_time_that_is_too_short_allows_one_step() -> None:
    clock = Clock()
    assert len(train(TimeBudget(0.5, clock=clock), clock, [3.0])) == 1


def test_the_loss_is_measured_every_tenth_of_the_time_and_at_the_end() -> None:
    clock = Clock()
    budget, judged, done = TimeBudget(100.0, clock=clock), [], 0
    while done < budget.total(done):
        clock.now += 3.0
        budget.advance()
        done += 1
        if budget.is_judged(done):
            judged.append(done)
    assert done == judged[-1] == 33
    assert len(judged) == JUDGEMENTS


def test_a_budget_continues_with_the_time_that_is_left() -> None:
    clock = Clock()
    first = TimeBudget(100.0, clock=clock)
    for _ in range(40):
        clock.now += 1.0
        first.advance()
    state = first.state()
    clock.now += 5000.0  # the run was interrupted
    second = TimeBudget(100.0, clock=clock)
    second.resume(state)
    assert second.total(40) == first.total(40) == 100
    assert len(train(second, clock, [1.0], done=40)) == 60
