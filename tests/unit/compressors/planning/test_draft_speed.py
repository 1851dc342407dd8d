"""The expected speed of a pair, against a simulation of its rounds."""

import random

import pytest

from lrc.compressors.planning.draft_speed import (
    MOST_DRAFTS,
    PredictedPair,
    best_drafts,
    expected_speed,
    predicted_acceptance,
    tokens_per_round,
)


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.3, 1), (0.8, 4), (0.95, 8)])
def test_tokens_of_a_round_are_those_of_simulated_rounds(acceptance: float, drafts: int) -> None:
    generator, rounds, written = random.Random(0), 40_000, 0
    for _ in range(rounds):
        accepted = 0
        while accepted < drafts and generator.random() < acceptance:
            accepted += 1
        written += accepted + 1
    assert tokens_per_round(acceptance, drafts) == pytest.approx(written / rounds, rel=0.02)
    closed = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    assert tokens_per_round(acceptance, drafts) == pytest.approx(closed, rel=1e-12)


def test_a_free_and_perfect_drafter_multiplies_the_speed_by_the_drafts() -> None:
    assert expected_speed(1.0, 5, 0.0) == 6
    assert best_drafts(1.0, 0.0) == (MOST_DRAFTS, MOST_DRAFTS + 1)


def test_a_drafter_as_slow_as_its_parent_gains_nothing() -> None:
    assert best_drafts(0.99, 1.0) == (0, 1.0)


def test_the_best_number_of_drafts_is_the_best() -> None:
    drafts, speed = best_drafts(0.8, 0.2)
    assert speed == max(expected_speed(0.8, k, 0.2) for k in range(40))
    assert expected_speed(0.8, drafts, 0.2) == speed


def test_acceptance_falls_with_the_divergence() -> None:
    rates = [predicted_acceptance(nats) for nats in (-1e-6, 0.0, 0.01, 0.1, 1.0, 10.0)]
    assert rates[:2] == [1.0, 1.0]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0.0


def test_a_smaller_drafter_can_be_the_faster_one_although_it_is_worse() -> None:
    large, small = PredictedPair.predict(0.5, 0.0, 0.6), PredictedPair.predict(0.2, 0.05, 0.3)
    assert small.acceptance < large.acceptance
    assert small.speed > large.speed
