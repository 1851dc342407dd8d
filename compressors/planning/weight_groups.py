"""What is decided as one: a matrix alone, or the matrices that share a factor."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, Literal

from lrc.compressors.layers import FORMS, Scheme, Sizes
from lrc.compressors.planning.allocators import smallest_rank, uniform
from lrc.compressors.planning.plan import Matrix
from lrc.configs.decompose import DecomposeBase

Measure = Literal["bits", "macs"]
WORDS: dict[Measure, str] = {"bits": "bits", "macs": "multiply-adds"}


@dataclass(frozen=True)
class Unit:
    """Matrices of one shape, form and fate; the first of several holds the factor they share.

    A cost is in bits of the file or in multiply-adds a token, whichever a recipe measures.
    """

    members: tuple[Matrix, ...]
    ratio: float = 2.0
    """At which sizes are counted: of a dictionary, atoms over coefficients."""

    @property
    def first(self) -> Matrix:
        """The matrix alone, or the owner of the shared factor."""
        return self.members[0]

    @property
    def source_bits(self) -> int:
        """Bits in the reference model."""
        return sum(m.source_bits for m in self.members)

    @property
    def sizes(self) -> Sizes | None:
        """Sizes as planned; None if dense or not chosen yet."""
        return self.first.sizes

    @property
    def _stacked(self) -> tuple[int, int]:
        """Shape of the weights stacked along their outputs, which limits what they share."""
        d_out, d_in = self.first.shape
        return len(self.members) * d_out, d_in

    @property
    def largest_step(self) -> int:
        """Number of the largest sizes there are."""
        return FORMS[self.first.form].largest_step(*self._stacked)

    def sizes_at(self, step: int) -> Sizes:
        """Return the sizes of a number; of a form with a rank, that rank.

        With a pattern several numbers have the same sizes.

        Raises
        ------
        ValueError
            If no weight of that shape can have the pattern.
        """
        form = FORMS[self.first.form]
        sizes = form.sizes_at(step, *self._stacked, self.ratio)
        if self.first.pattern is None:
            return sizes
        return form.two_of_four(*self._stacked, sizes)

    def bits(self, sizes: Sizes) -> int:
        """Count the bits of its form with `sizes` in the file."""
        return sum(m.stored_bits(sizes) for m in self.members)

    def dense_cost(self, measure: Measure) -> int:
        """Return the cost of the matrices as they are."""
        if measure == "bits":
            return self.source_bits
        return sum(m.shape[0] * m.shape[1] for m in self.members)

    def cost(self, sizes: Sizes, measure: Measure) -> int:
        """Return the cost with `sizes`: that of dense where they enlarge the file."""
        bits = self.bits(sizes)
        if bits >= self.source_bits:
            return self.dense_cost(measure)
        if measure == "bits":
            return bits
        return sum(FORMS[m.form].multiply_adds(*m.shape, **sizes) for m in self.members)

    def spent(self, measure: Measure) -> int:
        """Return the cost as planned; the sizes have to be known."""
        sizes = self.sizes
        return self.dense_cost(measure) if sizes is None else self.cost(sizes, measure)

    def step_within(self, keep: float, measure: Measure, *, multiple: int = 1) -> int:
        """Return the number of the largest sizes within a share of the dense cost; 0 if none."""
        dense = self.dense_cost(measure)
        return uniform(
            lambda step: self.step_cost(step, measure),
            dense,
            # Factors that cost what dense costs are no use even if the share is all of it.
            min(keep, (dense - 1) / dense),
            self.largest_step,
            multiple=multiple,
        )

    def step_cost(self, step: int, measure: Measure) -> int:
        """Return the cost with the sizes of a number."""
        return self.cost(self.sizes_at(step), measure)

    def cheapest(self, measure: Measure, *, multiple: int, min_keep: float) -> int:
        """Return the cost of the cheapest choice there is, dense among them."""
        dense = self.dense_cost(measure)

        def cost(step: int) -> int:
            return self.step_cost(step, measure)

        step = smallest_rank(cost, min_keep * dense, self.largest_step, multiple=multiple)
        return dense if step == 0 else min(cost(step), dense)

    def at(self, sizes: Sizes | int, **changes: Any) -> "Unit":
        """Return the unit with these sizes, or this rank."""
        return Unit(tuple(m.at(sizes, **changes) for m in self.members))

    def in_form(self, form: str) -> "Unit":
        """Return the unit in a form, its sizes not chosen; those that share keep theirs."""
        if form == self.first.form:
            return replace(self, members=tuple(replace(m, sizes=None) for m in self.members))
        members = tuple(replace(m, form=form, sizes=None) for m in self.members)
        return replace(self, members=members)

    @property
    def group(self) -> int:
        """Numbers of a row that share a scale; 1 where all of it do, or there are no scales."""
        scheme = self.first.scheme
        return 1 if scheme is None else Scheme.read(scheme).group_size or 1

    def rank_multiple(self, options: DecomposeBase) -> int:
        """Return what ranks are multiples of: as the stage asks, and as groups need."""
        return lcm(options.rank_multiple, self.group)

    def in_scheme(self, scheme: str | None) -> "Unit":
        """Return the unit with its numbers as integers of a scheme, rounded by its own stage."""
        stage = None if scheme is None else self.first.stage
        members = tuple(replace(m, scheme=scheme, rounded=stage) for m in self.members)
        return replace(self, members=members)

    def at_ratio(self, ratio: float) -> "Unit":
        """Return the unit, sizes of dictionaries counted at a ratio."""
        return replace(self, ratio=ratio)

    def dense(self, **changes: Any) -> "Unit":
        """Return the unit left dense."""
        return Unit(tuple(m.dense(**changes) for m in self.members))


def ratios_of(options: DecomposeBase, form: str | None = None) -> list[float]:
    """Return the ratios that a stage allows of atoms and coefficients, ascending, or a form's."""
    if form is not None and FORMS[form].RATIOS:
        return [*FORMS[form].RATIOS]
    asked = getattr(options, "ratio", 2.0)
    return sorted(set(asked)) if isinstance(asked, list) else [asked]


def units_of(matrices: Iterable[Matrix]) -> list[Unit]:
    """Gather the matrices that share a factor; in the order of their first."""
    groups: dict[str, list[Matrix]] = {}
    for m in matrices:
        groups.setdefault(m.group or m.name, []).append(m)
    return [Unit(tuple(group)) for group in groups.values()]
