"""Sizes of files: as a recipe writes them, `180MiB` or `1.5 GB`, and as they are printed."""

import re
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
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
    unit = unit_of(text)
    return int(Fraction(text.removesuffix(unit).strip()) * UNITS[unit])


def unit_of(text: str) -> str:
    """Return the unit of a size that matches `SIZE`."""
    return text.lstrip("0123456789. ")


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


def suitable_unit(n_bytes: float) -> str:
    """Return the unit in which a size is printed."""
    return "GiB" if n_bytes >= GIB else "MiB" if n_bytes >= MIB else "KiB"


def size_text(n_bytes: float | None, unit: str = "") -> str:
    """Return a size rounded as in tables, in `unit` or one that suits it.

    >>> size_text(1536), size_text(3 * 2**20), size_text(3 * 2**20, "GiB"), size_text(None)
    ('1.5 KiB', '3.0 MiB', '0.00293 GiB', 'unknown')
    """
    return "unknown" if n_bytes is None else _rounded(n_bytes, unit or suitable_unit(n_bytes))


def size_texts(*n_bytes: float) -> list[str]:
    """Return sizes that are compared, all in the unit that suits the largest.

    >>> size_texts(3 * 2**29, 2**28)
    ['1.50 GiB', '0.250 GiB']
    """
    return [size_text(each, suitable_unit(max(n_bytes))) for each in n_bytes]


def least_text(n_bytes: float, unit: str) -> str:
    """Return a lower bound of sizes, rounded up, in the unit of the size that it is compared with.

    >>> least_text(73_023, "kB"), least_text(73_023, "MiB"), least_text(73_023, "B")
    ('73.1 kB', '0.0697 MiB', '73,023 B')
    """
    return _rounded(n_bytes, unit, ROUND_CEILING)


def most_text(n_bytes: float, unit: str) -> str:
    """Return an upper bound of sizes, rounded down: see `least_text`."""
    return _rounded(n_bytes, unit, ROUND_FLOOR)


def apart_text(n_bytes: float, bound: float, unit: str) -> str:
    """Return a size as `size_text` does, rounded away from a bound that it does not equal.

    >>> [apart_text(mib * 2**20, 80 * 2**20, "MiB") for mib in (79.94, 79.96, 80, 80.04)]
    ['79.9 MiB', '79.9 MiB', '80.0 MiB', '80.1 MiB']
    """
    if n_bytes == bound or size_text(n_bytes, unit) != size_text(bound, unit):
        return size_text(n_bytes, unit)
    return least_text(n_bytes, unit) if n_bytes > bound else most_text(n_bytes, unit)


def _rounded(n_bytes: float, unit: str, rounding: str = ROUND_HALF_EVEN) -> str:
    """Round to the decimals of the unit or, below 1, to three digits."""
    number = Decimal(n_bytes) / UNITS[unit]
    decimals = 0 if unit == "B" else 2 if unit in ("GB", "GiB") else 1
    if unit != "B" and 0 < number < 1:
        decimals = max(decimals, 2 - number.adjusted())
    return f"{number.quantize(Decimal(1).scaleb(-decimals), rounding):,} {unit}"
