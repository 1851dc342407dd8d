"""Where a value of the recipe was written: a line of the file, or an override."""

from lrc.configs.errors import Problem

Path = tuple[str | int, ...]
Places = dict[Path, str]
"""File and line, or override, of every key and list entry; `()` is the file itself."""


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


def problem_at(path: Path, code: str, message: str, places: Places) -> Problem:
    """Return a problem with its place; what was not written has its parent's place."""
    known = path
    while known not in places:
        known = known[:-1]
    return Problem(code, dotted(path), message, places[known])
