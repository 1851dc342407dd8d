"""One-parameter families of sizes: which sizes a sum of components takes as it grows."""

from collections.abc import Mapping
from math import isqrt

from lrc.compressors.layers import COMPONENTS, ComponentConfig

SUM_RATIO = 0.1
"""Numbers of the low-rank part per value of the sparse part in ``pivoted_low_rank+sparse``."""


def largest_step(types: str, d_out: int, d_in: int, *, pattern: str | None = None) -> int:
    """Return the largest step of `components_at`; 0 if no weight of that shape has any."""
    return COMPONENTS[types.rpartition("+")[2]].largest_step(d_out, d_in, pattern=pattern)


def coarse(types: str) -> bool:
    """Return whether there are only a few steps, see `Component.COARSE`."""
    return COMPONENTS[types.rpartition("+")[2]].COARSE


def components_at(
    types: str, step: int, d_out: int, d_in: int, *, ratio: float = 2.0, pattern: str | None = None
) -> tuple[ComponentConfig, ...]:
    """Return the components number `step` of the family; larger steps store more.

    Parameters
    ----------
    types : str
        Component types joined by ``+``. The step counts the size of the last one.
    ratio : float
        Atoms per coefficient, for dictionaries.
    pattern : str, optional
        ``2:4``, with which several steps have the same sizes; or the factors of a chain of cores.

    Raises
    ------
    ValueError
        If no weight of that shape can have the pattern.
    """
    *others, last = types.split("+")
    sizes = COMPONENTS[last].sizes_at(step, d_out, d_in, ratio=ratio, pattern=pattern)
    end = ComponentConfig(last, sizes, pattern=pattern)
    if not others:
        return (end,)
    if others != ["pivoted_low_rank"]:
        raise ValueError(f"there are no sizes for {types}")
    rank = pivoted_rank(int(SUM_RATIO * step), d_out, d_in)
    return ComponentConfig("pivoted_low_rank", {"rank": rank}), end


def pivoted_rank(numbers: int, d_out: int, d_in: int) -> int:
    """Return the largest rank that takes at most `numbers` numbers as pivot rows; at least 1."""
    sides = d_out + d_in
    rank = min(d_out, d_in)
    if numbers < d_out * d_in:  # rank * (sides - rank) <= numbers
        rank = (sides - isqrt(sides**2 - 4 * numbers - 1) - 1) // 2
    return max(rank, 1)


def components_of(
    types: str, sizes: Mapping[str, int], *, pattern: str | None = None
) -> tuple[ComponentConfig, ...]:
    """Return the components of given types with given sizes."""
    found = []
    for name in types.split("+"):
        kind = COMPONENTS[name]
        own = {size: sizes[size] for size in kind.SIZES}
        found.append(ComponentConfig(name, own, pattern=pattern if kind.allows(pattern) else None))
    return tuple(found)
