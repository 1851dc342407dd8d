"""The expected speed of speculative decoding, and what is known about it before it is measured.

A drafter proposes k tokens in a round, each of which is accepted with probability a if those before
it were; a step of the drafter takes c times as long as one of its parent, and the parent reads all
drafts in a single step. Then a round gives ``(1 - a^(k + 1)) / (1 - a)`` tokens in the time of
``k c + 1`` steps of the parent (theorem 3.8 of [1]_).

References
----------
.. [1] Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023.
   https://arxiv.org/abs/2211.17192
"""

from dataclasses import dataclass
from math import sqrt

MOST_DRAFTS = 16
ROOT_COEFFICIENT = 0.55
"""(1 - top-1 agreement) / sqrt(KL divergence). Between 0.43 and 0.62 was measured on 1,022 to 4,088
tokens with six compressed versions of SmolLM2-135M (`kfac`, `svd-llm`, `gptq`, `drop`, healed
integers) with divergences from 0.02 to 2.2 nats per token."""


@dataclass(frozen=True)
class PredictedPair:
    """A budget of a drafter, and the predicted speed with its parent."""

    keep: float
    nats: float
    """Predicted divergence of the drafter, per token."""
    acceptance: float
    cost: float
    """Time of a step of the drafter over that of the parent."""
    drafts: int
    """Best number of drafts in a round; 0 if the parent alone is faster."""
    speed: float
    """Relative to the parent alone."""
    chosen: bool = False

    @classmethod
    def predict(cls, keep: float, nats: float, cost: float) -> "PredictedPair":
        """Predict acceptance and speed from the divergence and the cost."""
        acceptance = predicted_acceptance(nats)
        return cls(keep, nats, acceptance, cost, *best_drafts(acceptance, cost))

    @property
    def with_one_draft(self) -> float:
        """Speed with one draft in a round, which ranks pairs that are slower than the parent."""
        return expected_speed(self.acceptance, 1, self.cost)


def tokens_per_round(acceptance: float, drafts: int) -> float:
    """Return the expected number of tokens of a round, that of the parent included.

    >>> tokens_per_round(0.5, 2), tokens_per_round(1.0, 2)
    (1.75, 3.0)
    """
    return float(sum(acceptance**i for i in range(drafts + 1)))


def expected_speed(acceptance: float, drafts: int, cost: float) -> float:
    """Return the expected speed of a pair, relative to the parent alone.

    Parameters
    ----------
    acceptance : float
        Probability in [0, 1] that a draft is accepted if those before it were.
    drafts : int
        Number of drafts in a round; 0 is the parent alone.
    cost : float
        Time of a step of the drafter over that of the parent.

    >>> round(expected_speed(0.8, 4, 0.25), 3)
    1.681
    """
    return tokens_per_round(acceptance, drafts) / (drafts * cost + 1)


def best_drafts(acceptance: float, cost: float) -> tuple[int, float]:
    """Return the number of drafts, in [0, `MOST_DRAFTS`], with the highest expected speed, and it.

    >>> best_drafts(0.3, 0.9)
    (0, 1.0)
    """
    speeds = [expected_speed(acceptance, k, cost) for k in range(MOST_DRAFTS + 1)]
    best = max(speeds)
    return speeds.index(best), best


def predicted_acceptance(nats: float) -> float:
    """Estimate the acceptance of greedy drafts from the divergence of the drafter, nats per token.

    A sampled draft is accepted with probability 1 - TV, with the total variation distance of both
    predictions, which is at most ``sqrt(KL / 2)`` (Pinsker's inequality). Greedy drafts have no
    such bound; their disagreement grows with the root of the divergence too, with the measured
    `ROOT_COEFFICIENT` in place of ``sqrt(1 / 2)``.

    >>> round(predicted_acceptance(0.04), 3), predicted_acceptance(4.0)
    (0.89, 0.0)
    """
    return max(0.0, 1 - ROOT_COEFFICIENT * sqrt(max(nats, 0.0)))
