"""Which wins, a result or a plain alternative: one sentence, from bytes and perplexities alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIE = 0.005
"""Numbers nearer to each other than this share count as equal; a sentence says so."""
EQUAL = f"within {TIE:.1%}".replace("%", " %")


@dataclass(frozen=True)
class Rival:
    """An alternative beside the result."""

    name: str
    bytes: tuple[int, int]
    """Of the alternative and of the result; so are the perplexities."""
    perplexity: Mapping[str, tuple[float, float]]

    @property
    def size(self) -> int:
        """-1 if it is smaller than the result, 1 if it is larger, 0 if neither."""
        return _order(*self.bytes)

    @property
    def orders(self) -> dict[str, int]:
        """Text -> -1 if it is better there, 1 if it is worse, 0 if neither."""
        return {text: _order(*pair) for text, pair in self.perplexity.items()}

    @property
    def wins(self) -> bool:
        """Whether it is smaller or better, and in no respect the other way."""
        return max(self._all) <= 0 and not self.ties

    @property
    def loses(self) -> bool:
        """Whether it is larger or worse, and in no respect the other way."""
        return min(self._all) >= 0 and not self.ties

    @property
    def ties(self) -> bool:
        """Whether nothing tells it from the result."""
        return not any(self._all)

    @property
    def disagrees(self) -> bool:
        """Whether it is better on one text and worse on another."""
        return {-1, 1} <= {*self.orders.values()}

    @property
    def _all(self) -> list[int]:
        return [self.size, *self.orders.values()]

    @property
    def quality(self) -> str:
        """How it is on all texts together."""
        better = [text for text, order in self.orders.items() if order < 0]
        worse = [text for text, order in self.orders.items() if order > 0]
        if better and worse:
            return f"better on {_and(better)} and worse on {_and(worse)}"
        return "better" if better else "worse" if worse else f"as good {EQUAL}"

    @property
    def mean(self) -> float:
        """Mean logarithm of its perplexities."""
        return sum(math.log(value) for value, _ in self.perplexity.values()) / len(self.perplexity)

    def compared(self) -> str:
        """Say how it is, with the numbers: ``smaller (71 against 117 MiB) and better (...)``."""
        sizes = _bytes(*self.bytes)
        size = {-1: f"smaller ({sizes})", 0: f"as large {EQUAL} ({sizes})", 1: f"larger ({sizes})"}
        figures = ", ".join(
            f"{text} {_number(value)} against {_number(ours)}"
            for text, (value, ours) in self.perplexity.items()
        )
        link = "," if self.disagrees else " and"
        return f"{self.name} is {size[self.size]}{link} {self.quality} ({figures})"

    def in_short(self) -> str:
        """Say how it is, and at what share of the bytes."""
        ratio = self.bytes[0] / self.bytes[1]
        at = "the same bytes" if self.size == 0 else f"{ratio:.3g} times the bytes"
        return f"{self.name} is {self.quality} at {at}"


def verdict(
    result_bytes: int, perplexity: Mapping[str, float], alternatives: Sequence[Mapping[str, Any]]
) -> str | None:
    """Say which of a result and its plain alternatives wins.

    One wins against another that is neither smaller nor better, if it is one of the two itself. On
    several texts, better is what is better on one of them and worse on none.

    Parameters
    ----------
    result_bytes : int
        Of the tensors of the whole model, as those of the alternatives.
    perplexity : mapping
        Text -> that of the result.
    alternatives : sequence of mapping
        Each with ``name``, ``bytes`` and ``perplexity``, as the report holds them; a perplexity
        that is not finite is None.

    Returns
    -------
    str or None
        A sentence; None without alternatives.
    """
    rivals = [_rival(each, result_bytes, perplexity) for each in alternatives]
    if not rivals:
        return None
    winners = sorted((rival for rival in rivals if rival.wins), key=lambda rival: rival.mean)
    if winners:
        best, *more = winners
        names = _and([rival.name for rival in more])
        too = f", and {names} {'is' if len(more) == 1 else 'are'} ahead too" if more else ""
        kind = "rounding" if best.name.startswith("int") else "pruning"
        return f"{best.compared()}{too}: plain {kind} wins here."
    for rival in rivals:
        if rival.ties:
            return f"{rival.compared()}: a tie."
    for rival in rivals:
        if rival.disagrees and rival.size <= 0:
            return f"neither wins, the texts disagree: {rival.compared()}."
    return _unbeaten(rivals)


def _unbeaten(rivals: list[Rival]) -> str:
    """Say what a result is worth that nothing of its size or smaller comes near."""
    near = any(rival.size <= 0 for rival in rivals)
    none = "of this size or smaller is better" if near else "of this size or smaller was measured"
    beaten = [rival.name for rival in rivals if rival.loses]
    wins = (
        "this result wins: "
        if len(beaten) == len(rivals)
        else f"this result beats {_and(beaten)}: "
    )
    said = f"nothing plain {none}; {_and([rival.in_short() for rival in rivals])}."
    return wins + said if beaten else said


def _rival(record: Mapping[str, Any], size: int, perplexity: Mapping[str, float]) -> Rival:
    values = {text: record["perplexity"][text] for text in perplexity}
    pairs = {
        text: (math.inf if values[text] is None else values[text], ours)
        for text, ours in perplexity.items()
    }
    name = record["name"].partition(",")[0]  # what is behind a comma would read as another one
    return Rival(name, (record["bytes"], size), pairs)


def _order(one: float, other: float) -> int:
    """Return -1 if the first is less, 1 if it is more, 0 within the tie."""
    if abs(one - other) <= TIE * other:
        return 0
    return -1 if one < other else 1


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _bytes(one: int, other: int) -> str:
    """Write two sizes in the unit that suits the larger."""
    unit, factor = next(
        (unit, factor)
        for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
        if max(one, other) >= factor or factor == 1
    )
    a, b = (f"{n:.0f}" if n >= 100 else f"{n:.3g}" for n in (one / factor, other / factor))
    return f"{a} against {b} {unit}"
