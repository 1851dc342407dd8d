"""JSON files whose damage is noticed: strict parsing, and checksums within a record."""

import hashlib
import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

CHECKSUM = "sha256"
"""Key of a record that contains the checksum of its other keys."""


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


def checksum(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the keys of a record other than `CHECKSUM`.

    It does not depend on the order of keys or on white space.
    """
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
