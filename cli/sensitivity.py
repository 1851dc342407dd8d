"""Predicted and measured errors of matrices, as tables of decoder layers by projections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.measure import Measurement
from rich.table import Table

from lrc.cli.quality import OUT
from lrc.cli.tables import print_pairs, print_warnings
from lrc.compressors.compress.profile import Profile, rank_correlation
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.summary import WeightSummary, summarize


@dataclass(frozen=True)
class Quantity:
    """What is predicted: name and unit, how to aggregate it (sum or mean), format and lookup."""

    name: str
    unit: str
    total: str
    write: Callable[[float], str]
    predicted: Callable[[WeightSummary], float | None]


def _nats(value: float) -> str:
    """Format with seven characters, eight with a sign, and at least two significant digits."""
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


NATS = Quantity(
    "predicted loss increase", "nats per token", "sum", _nats, lambda m: m.result.predicted_nats
)
# Relative to a different total for every matrix, so that their sum is meaningless.
SHARE = Quantity(
    "predicted relative error",
    "%",
    "mean",
    lambda x: f"{100 * x:.2f}",
    lambda m: m.result.relative_error,
)


@dataclass(frozen=True)
class Grid:
    """Values of matrices by layer and by the last part of the name.

    A cell is given by layer and column; None selects all of them.
    """

    matrices: list[WeightSummary]
    values: Mapping[str, float]
    quantity: Quantity

    @property
    def layers(self) -> list[int]:
        """The rows."""
        return sorted({m.layer for m in self.matrices})

    @property
    def columns(self) -> list[str]:
        """The columns, in the order of the model even if layers lack some of them."""
        order: list[str] = []
        for layer in self.layers:
            place = len(order)
            for leaf in reversed([_leaf(m) for m in self.matrices if m.layer == layer]):
                if leaf not in order:
                    order.insert(place, leaf)
                place = order.index(leaf)
        return order

    def at(self, layer: int | None, column: str | None) -> list[WeightSummary]:
        """Return the matrices of a cell."""
        return [m for m in self.matrices if layer in (None, m.layer) and column in (None, _leaf(m))]

    def total(self, layer: int | None = None, column: str | None = None) -> float | None:
        """Return the aggregated value of a cell; None if it has none."""
        found = [self.values[m.name] for m in self.at(layer, column) if m.name in self.values]
        if not found:
            return None
        return sum(found) / (1 if self.quantity.total == "sum" else len(found))

    def text(self, layer: int | None = None, column: str | None = None) -> str:
        """Return the formatted total of a cell."""
        total = self.total(layer, column)
        return "" if total is None else self.quantity.write(total)

    def size(self, layer: int | None, column: str | None) -> str:
        """Return the formatted ranks of a cell, or the fraction kept of matrices without rank."""
        if layer is None or column is None:
            return ""
        compressed = [m for m in self.at(layer, column) if m.config.compressed]
        ranks = [m.rank for m in compressed if m.rank is not None]
        kept = sorted(m.bits / m.dense_bits for m in compressed if m.rank is None)
        found = ["r" + "-".join(map(str, sorted({min(ranks), max(ranks)})))] if ranks else []
        found += ["-".join(dict.fromkeys(f"{x:.0%}" for x in (kept[0], kept[-1])))] if kept else []
        return " ".join(found)

    def kept(self, column: str | None) -> str:
        """Return the fraction of the bits of a column that is kept."""
        matrices = self.at(None, column)
        return f"{sum(m.bits for m in matrices) / sum(m.dense_bits for m in matrices):.1%}"


def print_sensitivity(plan: Plan) -> None:
    """Print predicted error and size of every matrix, and the bits kept of every column."""
    for quantity, matrices in _by_quantity(plan):
        title = f"{quantity.name}, {quantity.unit}"
        grid = Grid(matrices, _predicted(matrices, quantity), quantity)
        sizes = (
            "rank"
            if all(m.rank for m in matrices if m.config.compressed)
            else "rank or fraction of the bits"
        )
        both = _table(grid, grid.text, grid.size, kept=True)
        if _fits(both):
            _print(f"{title}, and {sizes}", both)
        else:
            _print(title, _table(grid, grid.text, kept=True))
            _print(sizes, _table(grid, grid.size, totals=False))
        OUT.print(f"{quantity.name}, {quantity.total}: {grid.text()} {quantity.unit}")
    # Nothing is predicted for embeddings.
    embeddings = [f"{task.name} as {task.config.quantization}" for task in plan.embeddings]
    included = f", including {' and '.join(embeddings)}" if embeddings else ""
    OUT.print(f"kept {plan.kept:.1%} of the bits of the targeted matrices{included}")
    print_pairs(plan.pairs)
    print_warnings(plan)


def print_profile(plan: Plan, profile: Profile) -> None:
    """Print the measured effect of every matrix on the model, compared with the prediction."""
    for quantity, matrices in _by_quantity(plan):
        names = {m.name for m in matrices}
        real = {name: value for name, value in profile.divergences.items() if name in names}
        predicted = {
            name: value for name, value in _predicted(matrices, quantity).items() if name in real
        }
        measured, expected = Grid(matrices, real, NATS), Grid(matrices, predicted, quantity)
        title = f"measured divergence from the dense model, {NATS.unit}"
        both = _table(measured, measured.text, expected.text)
        if _fits(both):
            _print(f"{title}, and predicted", both)
        else:  # the table before shows the predictions
            _print(title, _table(measured, measured.text))
        if any(m.config.shares for m in matrices):
            OUT.print("matrices that share a factor count as one, in the row of the first")
        correlation = rank_correlation(*profile.compared(predicted))
        OUT.print(
            f"sum measured {measured.text()} {NATS.unit}, {quantity.total} predicted "
            f"{expected.text()} {quantity.unit}"
        )
        defined = "not defined" if correlation is None else f"{correlation:.3f}"
        OUT.print(f"rank correlation of measured and predicted (Spearman): {defined}")
    OUT.print(f"measured over {profile.tokens:,} tokens (--profile {profile.windows})")
    if profile.dense is not None:
        OUT.print(
            f"cross-entropy of the text: dense {profile.dense:.4f}, increased by "
            f"{sum(profile.increases.values()):.4f} {NATS.unit}, summed over the matrices"
        )


def _by_quantity(plan: Plan) -> list[tuple[Quantity, list[WeightSummary]]]:
    """Split the matrices by the quantity that their methods can predict."""
    names = {weight.name for task in plan.tasks for weight in task.weights}
    rows = [row for row in summarize(plan) if row.name in names]
    in_nats = {row.method for row in rows if row.result.predicted_nats is not None}
    parts = [
        (NATS, [row for row in rows if row.method in in_nats]),
        (SHARE, [row for row in rows if row.method not in in_nats]),
    ]
    return [(quantity, matrices) for quantity, matrices in parts if matrices]


def _predicted(matrices: list[WeightSummary], quantity: Quantity) -> dict[str, float]:
    """Return the predictions by name; dense matrices lose nothing."""
    known = {m.name: 0.0 if not m.config.compressed else quantity.predicted(m) for m in matrices}
    return {name: value for name, value in known.items() if value is not None}


def _leaf(matrix: WeightSummary) -> str:
    return matrix.name.rpartition(".")[2]


def _print(title: str, table: Table) -> None:
    OUT.print(title, style="italic")  # as the table's own title it could widen the table
    OUT.print(table)


def _table(
    grid: Grid,
    text: Callable[[int | None, str | None], str],
    second: Callable[[int | None, str | None], str] = lambda layer, column: "",
    *,
    totals: bool = True,
    kept: bool = False,
) -> Table:
    """Lay out `text` of every cell, followed by `second`."""
    total: Sequence[None] = [None] if totals else []
    rows, columns = [*grid.layers, *total], [*grid.columns, *total]
    width = max(len(second(row, column)) for row in rows for column in columns)

    def cell(layer: int | None, column: str | None) -> str:
        matrices = grid.at(layer, column)
        if layer is not None and matrices and all(not m.config.compressed for m in matrices):
            return "dense"
        after = f" [dim]{second(layer, column):>{width}}[/]" if width else ""
        return f"{text(layer, column)}{after}"

    table = Table(header_style="bold", box=None)
    table.add_column("layer", justify="right")
    for column in columns:
        table.add_column(column or grid.quantity.total, justify="right", no_wrap=True)
    for layer in rows:
        name = grid.quantity.total if layer is None else str(layer)
        table.add_row(name, *[cell(layer, column) for column in columns])
    if kept:
        table.add_row("kept", *[grid.kept(column) for column in columns])
    return table


def _fits(table: Table) -> bool:
    measured = Measurement.get(OUT, OUT.options.update(max_width=10**4), table)
    return measured.maximum <= OUT.width
