"""Where a value of the recipe was written: a line of the file, or an override."""

from collections.abc import Mapping
from typing import NamedTuple

from lrc.configs.errors import Problem

Path = tuple[str | int, ...]
Placed = tuple[int, Problem]
"""A problem after the number that sorts it: its line; overrides come after every line."""


class Finding(NamedTuple):
    """Something wrong with a value of the recipe, before its line is looked up."""

    path: Path
    code: str
    message: str


def one_line(text: str, longest: int = 60) -> str:
    """Put a text on one line, without control characters, and shorten it if it is long."""
    line = "".join(c if c.isprintable() else "\\n" if c == "\n" else "?" for c in text)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def dotted(path: Path) -> str:
    """Write a path the way errors show it.

    >>> dotted(("stages", 0, "decompose", "keep"))
    'stages[0].decompose.keep'
    """
    steps = (f"[{step}]" if isinstance(step, int) else f".{one_line(step)}" for step in path)
    return "".join(steps).removeprefix(".")


class Places:
    """The place of every key and list entry; what was not written has its parent's place.

    Parameters
    ----------
    name : str
        The recipe's name in messages, normally its path as the user gave it.
    lines : Mapping[Path, int]
        Line of every key and list entry in the file.
    """

    def __init__(self, name: str, lines: Mapping[Path, int]) -> None:
        self._name = name
        self._places = {path: (line, f"{name}:{line}") for path, line in lines.items()}
        self._places[()] = (0, name)

    def override(self, path: Path, order: int, label: str) -> None:
        """Record that an override wrote the value at `path` and everything below it."""
        for known in [known for known in self._places if known[: len(path)] == path]:
            del self._places[known]
        self._places[path] = (order, label)

    def problem(self, found: Finding, line: int | None = None) -> Placed:
        """Return the problem with its place, which is that of its path if no line is given."""
        known = found.path
        while known not in self._places:
            known = known[:-1]
        order, label = self._places[known]
        if line is not None:
            order, label = line, f"{self._name}:{line}"
        return order, Problem(found.code, dotted(found.path), found.message, label)
