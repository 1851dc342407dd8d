"""Compare a result with its baselines, by bytes and perplexities, in one sentence."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrc.compressors.evaluate.score_text import four_digits

TOLERANCE = 0.005
"""Numbers that differ by a smaller fraction count as equal; the sentence says so."""
EQUAL = f"within {100 * TOLERANCE:g} %"


@dataclass(frozen=True)
class _Comparison:
    """How a baseline compares with the result."""

    name: str
    size: int
    """-1 if the baseline is smaller, 1 if larger, 0 if equal."""
    orders: Collection[int]
    """-1 for every text on which it is better, 1 if worse, 0 if equal."""
    mean: float
    """Mean logarithm of its perplexities."""
    in_full: str
    """A clause with numbers: ``smaller (71 against 117 MiB) and better (...)``."""
    in_short: str
    """A clause with the quality and the relative size."""

    @property
    def outcome(self) -> str:
        """``wins`` if the baseline is smaller or better and in no respect the opposite."""
        found = {self.size, *self.orders} - {0}
        return {(): "ties", (-1,): "wins", (1,): "loses"}.get((*found,), "mixed")

    @property
    def texts_disagree(self) -> bool:
        """Whether the baseline is better on one text and worse on another."""
        return {-1, 1} <= {*self.orders}


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
        return f"plain {kind} wins: {best.in_full}{also}."
    for each in found:
        if each.outcome == "ties":
            return f"a tie: {each.in_full}."
    for each in found:
        if each.texts_disagree and each.size <= 0:
            return f"no winner, the texts disagree: {each.in_full}."
    measured = "better" if any(each.size <= 0 for each in found) else "measured"
    verb = "is" if measured == "better" else "was"
    beaten = [each.name for each in found if each.outcome == "loses"]
    summary = (
        f"{_and([each.in_short for each in found])}; "
        f"no baseline of this size or smaller {verb} {measured}."
    )
    if not beaten:
        return summary
    who = "wins" if len(beaten) == len(found) else f"beats {_and(beaten)}"
    return f"this result {who}: {summary}"


def _compare(record: Mapping[str, Any], size: int, perplexity: Mapping[str, float]) -> _Comparison:
    found = record["perplexity"]
    values = {text: math.inf if found[text] is None else found[text] for text in perplexity}
    orders = {text: _order(values[text], ours) for text, ours in perplexity.items()}
    better = [text for text, order in orders.items() if order < 0]
    worse = [text for text, order in orders.items() if order > 0]
    quality, link = "better" if better else "worse" if worse else f"as good {EQUAL}", " and"
    if better and worse:
        quality, link = f"better on {_and(better)} and worse on {_and(worse)}", ","
    figures = ", ".join(
        f"{text} {_number(values[text])} against {_number(ours)}"
        for text, ours in perplexity.items()
    )
    name = record["name"].partition(",")[0]  # a comma would separate clauses
    order = _order(record["bytes"], size)
    large = {-1: "smaller", 0: f"as large {EQUAL}", 1: "larger"}[order]
    at = f"{record['bytes'] / size:.3g} times the bytes" if order else "the same bytes"
    return _Comparison(
        name,
        order,
        orders.values(),
        sum(map(math.log, values.values())) / len(values),
        f"{name} is {large} ({_sizes(record['bytes'], size)}){link} {quality} ({figures})",
        f"{name} is {quality} at {at}",
    )


def _order(one: float, other: float) -> int:
    """Return -1 if the first is less, 1 if it is more, 0 within the tolerance."""
    if abs(one - other) <= TOLERANCE * other:
        return 0
    return -1 if one < other else 1


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _number(value: float) -> str:
    return four_digits(value) if math.isfinite(value) else "not finite"


def _sizes(one: int, other: int) -> str:
    """Format two sizes in the unit that suits the larger."""
    exponent = min(3, max(0, int(math.log2(max(one, other, 1)) // 10)))
    a, b = (size / 1024**exponent for size in (one, other))
    written = [f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in (a, b)]
    return f"{' against '.join(written)} {('B', 'KiB', 'MiB', 'GiB')[exponent]}"
