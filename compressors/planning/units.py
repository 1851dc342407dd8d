"""What gets one rank: a matrix alone, or the matrices that share a factor."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lrc.compressors.allocate import Options, smallest_rank, uniform
from lrc.compressors.layers import FORMS
from lrc.compressors.planning.plan import Matrix

Measure = Literal["bits", "macs"]
WORDS: dict[Measure, str] = {"bits": "bits", "macs": "multiply-adds"}


@dataclass(frozen=True)
class Unit:
    """Matrices of one shape, form and fate; the first of several holds the factor they share.

    A cost is in bits of the file or in multiply-adds a token, whichever a recipe measures.
    """

    members: tuple[Matrix, ...]

    @property
    def first(self) -> Matrix:
        """The matrix alone, or the owner of the shared factor."""
        return self.members[0]

    @property
    def source_bits(self) -> int:
        """Bits in the reference model."""
        return sum(m.source_bits for m in self.members)

    @property
    def max_rank(self) -> int:
        """Return the largest rank there is: that of the weights stacked along their outputs."""
        d_out, d_in = self.first.shape
        return min(len(self.members) * d_out, d_in)

    def bits(self, rank: int) -> int:
        """Count the bits of factors of `rank` in the file."""
        return sum(m.stored_bits(rank) for m in self.members)

    def dense_cost(self, measure: Measure) -> int:
        """Return the cost of the matrices as they are."""
        if measure == "bits":
            return self.source_bits
        return sum(m.shape[0] * m.shape[1] for m in self.members)

    def cost(self, rank: int, measure: Measure) -> int:
        """Return the cost of factors of `rank`: that of dense where they enlarge the file."""
        bits = self.bits(rank)
        if bits >= self.source_bits:
            return self.dense_cost(measure)
        if measure == "bits":
            return bits
        return sum(FORMS[m.form].multiply_adds(*m.shape, rank) for m in self.members)

    def spent(self, measure: Measure) -> int:
        """Return the cost as planned; the rank has to be known."""
        rank = self.first.rank
        return self.dense_cost(measure) if rank is None else self.cost(rank, measure)

    def largest_rank(self, keep: float, measure: Measure, *, multiple: int = 1) -> int:
        """Return the largest rank within a share of the dense cost; 0 if there is none."""
        dense = self.dense_cost(measure)
        return uniform(
            lambda rank: self.cost(rank, measure),
            dense,
            # Factors that cost what dense costs are no use even if the share is all of it.
            min(keep, (dense - 1) / dense),
            self.max_rank,
            multiple=multiple,
        )

    def cheapest(self, measure: Measure, *, multiple: int, min_keep: float) -> int:
        """Return the cost of the cheapest choice there is, dense among them."""
        dense = self.dense_cost(measure)

        def cost(rank: int) -> int:
            return self.cost(rank, measure)

        rank = smallest_rank(cost, min_keep * dense, self.max_rank, multiple=multiple)
        return dense if rank == 0 else min(cost(rank), dense)

    def at(self, rank: int, **changes: Any) -> "Unit":
        """Return the unit with factors of `rank`."""
        return Unit(tuple(m.at(rank, **changes) for m in self.members))

    def dense(self, **changes: Any) -> "Unit":
        """Return the unit left dense."""
        return Unit(tuple(m.dense(**changes) for m in self.members))

    def only_dense(self, measure: Measure) -> Options:
        """Return the options of a unit that nothing can be done with."""
        return Options.of([], [], [], self.dense_cost(measure))


def units_of(matrices: Iterable[Matrix]) -> list[Unit]:
    """Gather the matrices that share a factor; in the order of their first."""
    groups: dict[str, list[Matrix]] = {}
    for m in matrices:
        groups.setdefault(m.group or m.name, []).append(m)
    return [Unit(tuple(group)) for group in groups.values()]
