"""Compare a result with its baselines, by bytes and perplexities, in one sentence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.005
"""Numbers that differ by a smaller fraction count as equal; the sentence says so."""
EQUAL = f"within {100 * TOLERANCE:g} %"


@dataclass(frozen=True)
class _Comparison:
    """A baseline compared with the result; pairs are (baseline, result)."""

    name: str
    bytes: tuple[int, int]
    perplexity: Mapping[str, tuple[float, float]]
    """By text."""

    @property
    def size(self) -> int:
        """-1 if the baseline is smaller, 1 if larger, 0 if equal."""
        return _order(*self.bytes)

    @property
    def orders(self) -> dict[str, int]:
        """Text -> -1 if the baseline is better there, 1 if worse, 0 if equal."""
        return {text: _order(*pair) for text, pair in self.perplexity.items()}

    @property
    def outcome(self) -> str:
        """``wins`` if the baseline is smaller or better and in no respect the opposite."""
        found = {self.size, *self.orders.values()} - {0}
        return {(): "ties", (-1,): "wins", (1,): "loses"}.get((*found,), "mixed")

    @property
    def texts_disagree(self) -> bool:
        """Whether the baseline is better on one text and worse on another."""
        return {-1, 1} <= {*self.orders.values()}

    @property
    def quality(self) -> str:
        """How the baseline compares on all texts together."""
        better = [text for text, order in self.orders.items() if order < 0]
        worse = [text for text, order in self.orders.items() if order > 0]
        if better and worse:
            return f"better on {_and(better)} and worse on {_and(worse)}"
        return "better" if better else "worse" if worse else f"as good {EQUAL}"

    @property
    def mean(self) -> float:
        """Mean logarithm of the baseline's perplexities."""
        return sum(math.log(value) for value, _ in self.perplexity.values()) / len(self.perplexity)

    def in_full(self) -> str:
        """Return a clause with numbers: ``smaller (71 against 117 MiB) and better (...)``."""
        size = {-1: "smaller", 0: f"as large {EQUAL}", 1: "larger"}[self.size]
        figures = ", ".join(
            f"{text} {_number(value)} against {_number(ours)}"
            for text, (value, ours) in self.perplexity.items()
        )
        link = "," if self.texts_disagree else " and"
        return f"{self.name} is {size} ({_sizes(*self.bytes)}){link} {self.quality} ({figures})"

    def in_short(self) -> str:
        """Return a clause with the quality and the relative size."""
        ratio = self.bytes[0] / self.bytes[1]
        at = "the same bytes" if self.size == 0 else f"{ratio:.3g} times the bytes"
        return f"{self.name} is {self.quality} at {at}"


def compare_with_baselines(
    result_bytes: int, perplexity: Mapping[str, float], baselines: Sequence[Mapping[str, Any]]
) -> str | None:
    """Return a sentence on which of a result and its baselines wins; None without baselines.

    A model wins if it is smaller or better, and in no respect the opposite. On several texts,
    better means better on one of them and worse on none.

    `perplexity` maps texts to perplexities of the result. `baselines` are records of the report,
    where a perplexity that is not finite is None. Bytes are of the tensors of the whole model.
    """
    found = [_compare(each, result_bytes, perplexity) for each in baselines]
    if not found:
        return None
    winners = sorted((each for each in found if each.outcome == "wins"), key=lambda each: each.mean)
    if winners:
        best, *others = winners
        names = _and([each.name for each in others])
        also = f"; {names} {'wins' if len(others) == 1 else 'win'} as well" if others else ""
        kind = "quantization" if best.name.startswith("int") else "pruning"
        return f"plain {kind} wins: {best.in_full()}{also}."
    for each in found:
        if each.outcome == "ties":
            return f"a tie: {each.in_full()}."
    for each in found:
        if each.texts_disagree and each.size <= 0:
            return f"no winner, the texts disagree: {each.in_full()}."
    measured = "better" if any(each.size <= 0 for each in found) else "measured"
    verb = "is" if measured == "better" else "was"
    beaten = [each.name for each in found if each.outcome == "loses"]
    summary = (
        f"no baseline of this size or smaller {verb} {measured}; "
        f"{_and([each.in_short() for each in found])}."
    )
    if not beaten:
        return summary
    who = "wins" if len(beaten) == len(found) else f"beats {_and(beaten)}"
    return f"this result {who}: {summary}"


def _compare(record: Mapping[str, Any], size: int, perplexity: Mapping[str, float]) -> _Comparison:
    pairs = {}
    for text, ours in perplexity.items():
        value = record["perplexity"][text]
        pairs[text] = (math.inf if value is None else value, ours)
    name = record["name"].partition(",")[0]  # a comma would separate clauses
    return _Comparison(name, (record["bytes"], size), pairs)


def _order(one: float, other: float) -> int:
    """Return -1 if the first is less, 1 if it is more, 0 within the tolerance."""
    if abs(one - other) <= TOLERANCE * other:
        return 0
    return -1 if one < other else 1


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _sizes(one: int, other: int) -> str:
    """Format two sizes in the unit that suits the larger."""
    exponent = min(3, max(0, int(math.log2(max(one, other, 1)) // 10)))
    a, b = (size / 1024**exponent for size in (one, other))
    written = [f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in (a, b)]
    return f"{' against '.join(written)} {('B', 'KiB', 'MiB', 'GiB')[exponent]}"
