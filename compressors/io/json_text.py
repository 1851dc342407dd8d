"""Parse JSON without accepting what is not JSON, or is ambiguous."""

import json
from math import isfinite
from typing import Any


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Parse JSON text, in which every key of an object must occur once.

    Parameters
    ----------
    text : str
    finite : bool
        Whether ``NaN``, ``Infinity`` and numbers that overflow are errors. Configs of other tools
        contain them.

    Raises
    ------
    ValueError
    """
    options: dict[str, Any] = {}
    if finite:
        options = {"parse_constant": _finite, "parse_float": _finite}
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys, **options)
    except RecursionError:
        raise ValueError("the values are nested too deeply") from None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} occurs more than once in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
