"""Shorten lists in messages."""

from collections.abc import Sequence

SHOWN = 5


def shortened(items: Sequence[str], separator: str = "; ") -> str:
    """Return the first five items of a list, and the number of the others."""
    more = f" (and {len(items) - SHOWN} more)" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more
