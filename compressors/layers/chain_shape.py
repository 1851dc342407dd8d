"""Shapes of chains of cores: factors of the two dimensions of a matrix, and bond dimensions.

Each core has some factors of the outputs and of the inputs. How the dimensions are factored is the
pattern of the component, such as ``24x24,32x48`` for the outputs and the inputs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from operator import mul

PATTERN = re.compile(r"([1-9]\d*(?:x[1-9]\d*)+),([1-9]\d*(?:x[1-9]\d*)+)")
CORES = (2, 4)
"""Least and largest number of cores."""


@cache
def balanced_factors(n: int, count: int) -> tuple[int, ...]:
    """Return `count` factors of `n` with the smallest sum, in ascending order.

    >>> balanced_factors(576, 3), balanced_factors(7, 2)
    ((8, 8, 9), (1, 7))
    """
    if count == 1:
        return (n,)
    found = []
    first = 1
    while first**count <= n:  # the smallest factor
        if n % first == 0:
            found.append(tuple(sorted((first, *balanced_factors(n // first, count - 1)))))
        first += 1
    return min(found, key=sum)


def pattern_for(d_out: int, d_in: int, cores: int, given: Sequence[Sequence[int]] = ()) -> str:
    """Return the pattern of a chain of `cores` cores.

    Large factors of one dimension meet small ones of the other. The largest cores are at the ends,
    where there is one bond instead of two.

    Parameters
    ----------
    given : sequence of sequence of int
        Factors of the dimensions that are their products, in this order; others are factored
        automatically.

    Examples
    --------
    >>> pattern_for(576, 1536, 2), pattern_for(576, 1536, 2, [[2, 288]])
    ('24x24,48x32', '2x288,48x32')
    """
    chosen = {prod(factors): tuple(factors) for factors in given}
    outputs, inputs = chosen.get(d_out), chosen.get(d_in)
    if outputs is None and inputs is None:
        descending = balanced_factors(d_out, cores)[::-1]
        pairs = sorted(zip(descending, balanced_factors(d_in, cores), strict=True), key=prod)
        ordered = [pairs[-1], *pairs[:-2], pairs[-2]]
        outputs, inputs = (tuple(side) for side in zip(*ordered, strict=True))
    elif outputs is None:
        assert inputs is not None
        outputs = _opposite(inputs, balanced_factors(d_out, len(inputs)))
    elif inputs is None:
        inputs = _opposite(outputs, balanced_factors(d_in, len(outputs)))
    return ",".join("x".join(map(str, side)) for side in (outputs, inputs))


def _opposite(known: Sequence[int], ascending: Sequence[int]) -> tuple[int, ...]:
    """Give the largest of `known` the smallest of the other factors, and so on."""
    order = sorted(range(len(known)), key=lambda k: known[k], reverse=True)
    return tuple(ascending[order.index(k)] for k in range(len(known)))


@dataclass(frozen=True)
class ChainShape:
    """The shapes of cores: core k is [bonds[k], outputs[k], inputs[k], bonds[k + 1]]."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    bonds: tuple[int, ...]
    """The first and the last one are 1."""

    @classmethod
    def of(cls, d_out: int, d_in: int, pattern: str | None, bond: int) -> "ChainShape":
        """Return the shape whose bond dimensions are `bond`, or less where that is full.

        Raises
        ------
        ValueError
            If the pattern is not one of that matrix, or the bond dimension is out of range.
        """
        outputs, inputs = _parsed(d_out, d_in, pattern)
        full = _full_bonds(outputs, inputs)
        if not 1 <= bond <= max(full):
            raise ValueError(
                f"bond must be in [1, {max(full)}] for [{d_out}, {d_in}] with the factors "
                f"{_text(outputs)} and {_text(inputs)}, got {bond}"
            )
        return cls(outputs, inputs, (1, *(min(bond, each) for each in full), 1))

    @property
    def cores(self) -> list[tuple[int, int, int, int]]:
        """The shape of every core."""
        return list(zip(self.bonds, self.outputs, self.inputs, self.bonds[1:], strict=False))

    @property
    def from_first(self) -> int:
        """Multiply-adds per token if the first core is multiplied first."""
        return self._sweep(self.outputs, self.inputs)

    @property
    def from_last(self) -> int:
        """Multiply-adds per token if the last core is multiplied first."""
        return self._sweep(self.inputs, self.outputs)

    def _sweep(self, before: Sequence[int], after: Sequence[int]) -> int:
        return sum(
            prod(before[:k]) * prod(after[k + 1 :]) * prod(core)
            for k, core in enumerate(self.cores)
        )

    @property
    def whole(self) -> int:
        """Multiply-adds to multiply the cores out to the matrix."""
        sizes = (m * n for m, n in zip(self.outputs, self.inputs, strict=True))
        entries = list(accumulate(sizes, mul))  # of the matrix of the first cores
        return sum(done * prod(core) for done, core in zip(entries, self.cores[1:], strict=False))


def largest_bond(d_out: int, d_in: int, pattern: str | None) -> int:
    """Return the bond dimension at which every matrix is a chain with a pattern.

    Raises
    ------
    ValueError
        If the pattern is not one of that matrix.
    """
    return max(_full_bonds(*_parsed(d_out, d_in, pattern)))


def _full_bonds(outputs: Sequence[int], inputs: Sequence[int]) -> list[int]:
    """Return the largest useful bond dimension between every core and the next one."""
    sizes = [m * n for m, n in zip(outputs, inputs, strict=True)]
    return [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]


def _parsed(d_out: int, d_in: int, pattern: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the factors of outputs and inputs that a pattern states."""
    found = None if pattern is None else PATTERN.fullmatch(pattern)
    if found is None:
        raise ValueError(
            "'pattern' of tensor_train must be the factors of outputs and inputs, such as "
            f"24x24,32x48, got {pattern!r:.60}"
        )
    outputs, inputs = (tuple(map(int, side.split("x"))) for side in found.groups())
    least, most = CORES
    if len(outputs) != len(inputs) or not least <= len(outputs) <= most:
        raise ValueError(
            f"'pattern' of tensor_train must be {least} to {most} factors for outputs and as many "
            f"for inputs, got {pattern!r:.60}"
        )
    for name, d, factors in (("outputs", d_out, outputs), ("inputs", d_in, inputs)):
        if prod(factors) != d:
            raise ValueError(
                f"the factors of the {name} must multiply to {d}, got {_text(factors)}"
            )
    for k, (m, n) in enumerate(zip(outputs, inputs, strict=True), start=1):
        if m * n == 1:
            raise ValueError(
                f"[{d_out}, {d_in}] cannot be factored into {len(outputs)} cores: with the factors "
                f"{_text(outputs)} and {_text(inputs)}, core {k} has one output and one input"
            )
    return outputs, inputs


def _text(factors: Sequence[int]) -> str:
    return "x".join(map(str, factors))
