"""Sizes of files as a recipe writes them: `180MiB`, `1.5 GB`."""

import re
from fractions import Fraction

MIB, GIB = 2**20, 2**30
DECIMAL_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS = DECIMAL_UNITS | {"KiB": 2**10, "MiB": MIB, "GiB": GIB}
"""Bytes of each unit."""

SIZE = rf"^[0-9]{{1,15}}(\.[0-9]{{1,15}})? ?({'|'.join(UNITS)})$"
"""Pattern of a size: a number and a unit, with at most one space between."""

SIZE_WORDS = "a size such as 180MiB"
SIZE_REMEDY = f"write a number and a unit, one of {', '.join(UNITS)}"


def parse_size(text: str) -> int:
    """Return the bytes that a size stands for; a fraction of a byte is dropped.

    Raises
    ------
    ValueError
        If the text does not match `SIZE`.

    >>> parse_size("1.5 KiB"), parse_size("2kB")
    (1536, 2000)
    """
    if not re.search(SIZE, text) or text.endswith("\n"):  # `$` lets one line end pass
        raise ValueError(f"must be {SIZE_WORDS}, got '{text}'; {SIZE_REMEDY}")
    unit = text.lstrip("0123456789. ")
    return int(Fraction(text.removesuffix(unit).strip()) * UNITS[unit])


def size_words(n_bytes: float) -> str:
    """Return an exact size in the largest unit that leaves at most two decimals.

    >>> size_words(230 * 2**20), size_words(1.5 * 2**30), size_words(80 * 10**6), size_words(1537)
    ('230MiB', '1.5GiB', '80MB', '1537B')
    """
    for unit, size in sorted(UNITS.items(), key=lambda each: -each[1]):
        number = n_bytes / size
        if number >= 1 and round(number, 2) * size == n_bytes:
            return f"{number:.15g}{unit}"
    return f"{n_bytes:.15g}B"
