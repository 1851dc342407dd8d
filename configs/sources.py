"""Texts that a recipe reads: one source, or several with the fraction of each."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from lrc.configs.strict import Text

TOLERANCE = 1e-6


def _add_up(fractions: dict[str, float]) -> dict[str, float]:
    total = sum(fractions.values())
    if abs(total - 1) > TOLERANCE:
        raise ValueError(
            f"fractions of sources must add up to 1, got {total:.6g}; change them, as in "
            "{c4: 0.5, self: 0.5}"
        )
    return fractions


Mixture = Annotated[
    dict[Text, Annotated[float, Field(gt=0, le=1)]],
    AfterValidator(_add_up),
    Field(
        json_schema_extra={
            "x-words": "a mapping of sources to fractions",
            "x-remedy": "write one name, or every source with its fraction: {c4: 0.5, self: 0.5}",
        }
    ),
]
Source = Text | Mixture
"""A source, or a mapping of sources to fractions of the tokens."""


def fractions(source: str | Mapping[str, float]) -> dict[str, float]:
    """Return the fraction of every source."""
    return {source: 1.0} if isinstance(source, str) else dict(source)


def counts(source: str | Mapping[str, float], total: int) -> dict[str, int]:
    """Divide a number of windows or tokens between sources, by largest remainder.

    >>> counts({"c4": 0.5, "self": 0.3, "mine.txt": 0.2}, 7)
    {'c4': 4, 'self': 2, 'mine.txt': 1}
    """
    given = fractions(source)
    unit = total / sum(given.values())
    exact = {name: fraction * unit for name, fraction in given.items()}
    found = {name: int(share + TOLERANCE) for name, share in exact.items()}
    left = total - sum(found.values())
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[:left]:
        found[name] += 1
    return found


def described(source: str | Mapping[str, float]) -> str:
    """Return a source in words.

    >>> described({"c4": 0.75, "self": 0.25})
    '75 % c4, 25 % self'
    """
    if isinstance(source, str):
        return source
    return ", ".join(f"{100 * fraction:.3g} % {name}" for name, fraction in source.items())
