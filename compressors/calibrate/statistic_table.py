"""The statistics that calibration can collect, as a table of running sums over tokens.

A new statistic is a row of `FORWARD` or `BACKWARD` and a field of the same name in `Statistics`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Self

from torch import Tensor

from lrc.compressors.calibrate.symmetric_storage import packed_numbers
from lrc.compressors.models.architecture import Linear
from lrc.compressors.solvers.linalg import add_gram_
from lrc.compressors.solvers.moments import Moment, Statistics

Required = Mapping[str, Collection[str]]
"""Linear -> names of the fields of `Statistics` to collect. ``whole_inputs`` and
``whole_gradients`` also demand the full matrix of that moment instead of its image;
``capped_inputs`` weights the tokens of the inputs by `token_weights`, unless another linear with
the same input needs them unweighted."""


class RunningSums(dict[str, Tensor]):
    """Running sums by name; absent until first added to."""

    def add(self, key: str, total: Tensor) -> None:
        """Add a batch's sum."""
        self[key] = self[key] + total if key in self else total

    def add_square(self, key: str, x: Tensor) -> None:
        """Add the second moment [d, d] of tokens ``x`` [..., d]."""
        x = x.reshape(-1, x.shape[-1])  # [n_tokens, d]
        if key not in self:
            self[key] = x.new_zeros(x.shape[1], x.shape[1])
        add_gram_(self[key], x)

    def add_product(self, key: str, x: Tensor, y: Tensor) -> None:
        """Add ``x.T @ y`` of tokens ``x`` [n_tokens, d] and ``y`` [n_tokens, e].

        In place, because the sum can be a GiB.
        """
        if key not in self:
            self[key] = x.new_zeros(x.shape[1], y.shape[1])
        self[key].addmm_(x.T, y)


class LinearBatch(NamedTuple):
    """Inputs and outputs of one linear for a batch of windows."""

    x: Tensor
    """Inputs [..., d_in]; [n, length, d_in] in the backward pass."""
    y: Tensor
    """Forward: ``x @ W.T`` [..., d_out]. Backward: gradients at the output [n, length, d_out]."""
    W: Tensor

    @property
    def tokens(self) -> Tensor:
        """`x` as [n_tokens, d_in]."""
        return self.x.reshape(-1, self.x.shape[-1])

    @property
    def gradients(self) -> Tensor:
        """`y` as [n_tokens, d_out]."""
        return self.y.reshape(-1, self.y.shape[-1])


@dataclass(frozen=True)
class Row:
    """A row of the table: the shape of a running sum, and how a batch is added to it."""

    shape: str
    accumulate: Callable[[RunningSums, str, LinearBatch], None]
    shared: bool = False
    """Depends on the inputs only: collected once for all linears with the same input."""
    symmetric: bool = False
    """A second moment, of which one triangle is stored."""

    def numbers(self, linear: Linear, *, stored: bool) -> int:
        """Return how many numbers the sum of a linear has, or how many of them are stored."""
        sides: list[int] = [getattr(linear, side) for side in self.shape.strip("[]").split(", ")]
        return packed_numbers(sides[0]) if stored and self.symmetric else prod(sides)


def _second_moment(
    shape: str, tokens: Callable[[LinearBatch], Tensor], *, shared: bool = False
) -> Row:
    return Row(shape, lambda s, k, b: s.add_square(k, tokens(b)), shared, symmetric=True)


def _add_row_fisher(sums: RunningSums, key: str, batch: LinearBatch) -> None:
    for g, x in zip(batch.y, batch.x, strict=True):  # a window is a sample
        sums.add(key, (g.T @ x).square().sum(dim=1))


FORWARD = {
    "inputs": _second_moment("[d_in, d_in]", lambda batch: batch.tokens, shared=True),
    "image": _second_moment("[d_out, d_out]", lambda batch: batch.y),
    "diagonal": Row("[d_in]", lambda s, k, b: s.add(k, b.tokens.square().sum(0)), shared=True),
    "input_mean": Row("[d_in]", lambda s, k, b: s.add(k, b.tokens.sum(0)), shared=True),
    "input_magnitude": Row("[d_in]", lambda s, k, b: s.add(k, b.tokens.abs().sum(0)), shared=True),
}
BACKWARD = {
    "gradients": _second_moment("[d_out, d_out]", lambda batch: batch.gradients),
    "image": _second_moment("[d_in, d_in]", lambda batch: batch.gradients @ batch.W),
    "diagonal": Row("[d_out]", lambda s, k, b: s.add(k, b.gradients.square().sum(0))),
    "row_fisher": Row("[d_out]", _add_row_fisher),
}


class LinearStatistics:
    """Running sums for the linears of one layer in one pass."""

    def __init__(
        self,
        table: Mapping[str, Row],
        rows: Mapping[str, Collection[str]],
        capped: Collection[str] = (),
        gated: Collection[str] = (),
    ) -> None:
        """Accumulate ``rows[name]`` of the table for each linear `name`.

        The tokens of the linears in `capped` are to be weighted by `token_weights`, those of the
        linears in `gated` by the router, if they belong to an expert.
        """
        self.capped, self.gated = capped, gated
        self.n_tokens: Counter[str] = Counter()
        """By linear."""
        self._table = table
        self._rows = {name: dict.fromkeys(selected) for name, selected in rows.items()}
        self.sums = RunningSums()
        self.watched = [name for name, selected in rows.items() if selected]

    def add(self, name: str, batch: LinearBatch) -> None:
        """Add a batch of one linear."""
        self.n_tokens[name] += len(batch.tokens)
        for row in self._rows[name]:
            self._table[row].accumulate(self.sums, f"{name}.{row}", batch)

    @classmethod
    def union(cls, parts: Sequence[Self]) -> Self:
        """Select the rows of all `parts`, which are of one table and weight tokens equally."""
        rows: defaultdict[str, list[str]] = defaultdict(list)
        for part in parts:
            for name, selected in part._rows.items():
                rows[name] += selected
        return cls(parts[0]._table, rows, parts[0].capped, parts[0].gated)

    def of(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the sums of a union that belong to this part of it."""
        selected = (f"{name}.{row}" for name, rows in self._rows.items() for row in rows)
        return {key: sums[key] for key in selected if key in sums}

    def numbers(self, linears: Mapping[str, Linear], *, stored: bool) -> int:
        """Return how many numbers all sums have, or how many of them are stored."""
        return sum(
            self._table[row].numbers(linears[name], stored=stored)
            for name, rows in self._rows.items()
            for row in rows
        )

    @classmethod
    def forward(
        cls, groups: list[list[str]], linears: Mapping[str, Linear], required: Required
    ) -> Self:
        """Select the rows of `FORWARD` for a layer whose `groups` of linears share an input.

        The second moment of an input that is wider than all outputs computed from it is
        accumulated as its images through the weights: the second moments of those outputs.

        Inputs of experts are weighted by the router, so that the error of an output counts as much
        as it changes the output of the layer, unless gradients weight it already, or a mean is
        needed too.
        """
        rows: defaultdict[str, list[str]] = defaultdict(list)
        capped, gated = set(), set()
        for group in groups:
            leader, members = group[0], [name for name in group if required.get(name)]
            names = {each for name in members for each in required[name]}
            rows[leader] += [row for row in FORWARD if row in names and row != "inputs"]
            moments = [name for name in members if "inputs" in required[name]]
            if not moments:
                continue
            rows[leader].append("diagonal")
            if all("capped_inputs" in required[name] for name in members):
                capped.add(leader)
            if not names & {"gradients", "input_mean"}:
                gated.add(leader)
            width, heights = linears[leader].d_in, [linears[name].d_out for name in moments]
            smaller = max(heights) <= width and sum(height**2 for height in heights) < width**2
            if smaller and "whole_inputs" not in names:
                for name in moments:
                    rows[name].append("image")
            else:
                rows[leader].append("inputs")
        return cls(FORWARD, rows, capped, gated)

    @classmethod
    def backward(cls, linears: Mapping[str, Linear], required: Required) -> Self:
        """Select the rows of `BACKWARD` for a layer.

        The second moment at an output that is wider than its input is accumulated as its image
        through the weight: the second moment of the gradients at the input.
        """
        rows: dict[str, list[str]] = {}
        for name, names in required.items():
            rows[name] = [row for row in BACKWARD if row in names and row != "gradients"]
            if "gradients" in names:
                wide = linears[name].d_out > linears[name].d_in and "whole_gradients" not in names
                rows[name] += ["diagonal", "image" if wide else "gradients"]
        return cls(BACKWARD, rows)


def sum_names(table: Mapping[str, Row], name: str, leader: str) -> dict[str, str]:
    """Map the stored names of one linear's sums to rows of the table.

    `leader` is the linear that holds the shared sums.
    """
    return {f"{leader if row.shared else name}.{key}": key for key, row in table.items()}


def build_statistics(
    n_tokens: int,
    forward: Mapping[str, Tensor],
    backward: Mapping[str, Tensor],
    n_routed: int | None = None,
) -> Statistics:
    """Build the record of one linear from its sums, by row of the tables.

    Parameters
    ----------
    n_tokens : int
        Tokens of the calibration text; of an encoder-decoder model, those that are predicted, over
        which losses are means.
    forward, backward : mapping of str to Tensor
    n_routed : int, optional
        Those that reach the linear, if it belongs to an expert or to an encoder-decoder model.

    Notes
    -----
    Kronecker factoring treats inputs and gradients as independent. For an expert that holds among
    its own tokens; the gradients of all others are zero. The second moment of its inputs is
    therefore extended to `n_tokens` tokens like its own, so that products of both moments are on
    the scale of those of other linears, and weighted by the tokens of the expert. So it
    is for encoder-decoder models, whose encoder has other tokens than the decoder.
    """
    inputs, gradients = _moment(forward, "inputs"), _moment(backward, "gradients")
    if n_routed is not None:
        if inputs is not None and gradients is not None:
            inputs = inputs.scaled(n_tokens / n_routed)
        else:
            n_tokens = n_routed
    parts = ("inputs", "gradients", "image", "diagonal")
    plain = {key: sums[key] for sums in (forward, backward) for key in sums if key not in parts}
    return Statistics(n_tokens, inputs=inputs, gradients=gradients, **plain)


def is_symmetric(row: str) -> bool:
    """Return whether the sums of a row of the tables are second moments."""
    return any(row in table and table[row].symmetric for table in (FORWARD, BACKWARD))


def _moment(sums: Mapping[str, Tensor], full: str) -> Moment | None:
    if "diagonal" not in sums or not {full, "image"} & set(sums):
        return None
    return Moment(sums["diagonal"], full=sums.get(full), image=sums.get("image"))
