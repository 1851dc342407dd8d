"""Gates as text: `perplexity.c4 <= 1.02x`, `size <= 80MiB`."""

import re
from math import inf
from typing import Any

from lrc.configs.size import UNITS, parse_size

BOUNDS = {"<=": "at_most", ">=": "at_least"}
GATE_WORDS = "a gate such as 'perplexity.c4 <= 1.02x'"
NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?"


def parse_gate(text: str) -> dict[str, Any]:
    """Return the options of a gate that is written as a comparison.

    A number that ends in ``x`` is compared with compressed / dense. Sizes may have units.

    Raises
    ------
    ValueError
        If the text is not a comparison of a metric with a number.

    >>> parse_gate("perplexity.c4 <= 1.02x")
    {'metric': 'perplexity.c4', 'at_most': 1.02, 'relative': True}
    >>> parse_gate("size<=1.5KiB")
    {'metric': 'size', 'at_most': 1536.0, 'relative': False}
    """
    found = re.fullmatch(rf"\s*(\S+?)\s*(<=|>=)\s*({NUMBER}) ?(x|{'|'.join(UNITS)})?\s*", text)
    if found is None:
        raise ValueError(
            f"must be {GATE_WORDS}, got '{text}'; write a metric, <= or >=, and a number, with x "
            "at its end for a ratio to the dense model"
        )
    metric, sign, number, unit = found.groups()
    if unit in UNITS and metric != "size":
        raise ValueError(f"only size is in {unit}, got '{text}'; remove the unit")
    value = float(number) if unit in (None, "x") else float(parse_size(f"{number}{unit}"))
    if value == inf:
        raise ValueError(f"must be {GATE_WORDS}, got '{text}'; write a finite number")
    return {"metric": metric, BOUNDS[sign]: value, "relative": unit == "x"}
