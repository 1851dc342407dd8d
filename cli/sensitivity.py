"""What matrices lose, predicted and measured, as tables of decoder layers by projections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.measure import Measurement
from rich.table import Table

from lrc.cli.cells import OUT
from lrc.cli.tables import print_warnings
from lrc.compressors.compress.profile import Profile, spearman
from lrc.compressors.planning.plan import Matrix, Plan


@dataclass(frozen=True)
class Quantity:
    """A loss: its unit, what stands for several of them, how one is written and looked up."""

    unit: str
    total: str
    write: Callable[[float], str]
    predicted: Callable[[Matrix], float | None]


def _nats(value: float) -> str:
    """Write seven characters, eight with a sign, and two digits that count at least."""
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


# Shares are of different energies: their sum would mean nothing.
NATS = Quantity("nats a token", "sum", _nats, lambda m: m.predicted_nats)
SHARE = Quantity("% of the energy", "mean", lambda x: f"{100 * x:.2f}", lambda m: m.loss)


@dataclass(frozen=True)
class Grid:
    """Values of matrices by the number of the layer and the last part of the name.

    A place is a layer and a column; None stands for all of them.
    """

    matrices: list[Matrix]
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

    def at(self, layer: int | None, column: str | None) -> list[Matrix]:
        """Return the matrices of a place."""
        return [m for m in self.matrices if layer in (None, m.layer) and column in (None, _leaf(m))]

    def total(self, layer: int | None = None, column: str | None = None) -> float | None:
        """Return what the values of a place come to; None where there are none."""
        found = [self.values[m.name] for m in self.at(layer, column) if m.name in self.values]
        if not found:
            return None
        return sum(found) if self.quantity.total == "sum" else sum(found) / len(found)

    def text(self, layer: int | None = None, column: str | None = None) -> str:
        """Return the total of a place as it is printed."""
        total = self.total(layer, column)
        return "" if total is None else self.quantity.write(total)

    def size(self, layer: int | None, column: str | None) -> str:
        """Return ranks of a cell as they are printed, and of what has none the share it keeps."""
        if layer is None or column is None:
            return ""
        there = [m for m in self.at(layer, column) if m.sizes is not None]
        ranks = [m.rank for m in there if m.rank is not None]
        shares = [m.bits / m.source_bits for m in there if m.rank is None]
        found = ["r" + "-".join(map(str, sorted({min(ranks), max(ranks)})))] if ranks else []
        found += ["-".join(dict.fromkeys(f"{share:.0%}" for share in _ends(shares)))]
        return " ".join(filter(None, found))

    def kept(self, column: str | None) -> str:
        """Return the share of the bits of a column that is kept."""
        there = self.at(None, column)
        return f"{sum(m.bits for m in there) / sum(m.source_bits for m in there):.1%}"


def print_sensitivity(plan: Plan) -> None:
    """Print what every matrix loses by prediction, its rank, and what is kept of every column."""
    for quantity, matrices in _by_quantity(plan):
        title = f"predicted loss, {quantity.unit}"
        grid = Grid(matrices, _predicted(matrices, quantity), quantity)
        both = _table(grid, grid.text, grid.size, kept=True)
        sizes = "rank" if all(m.rank for m in matrices if m.sizes) else "rank or share of the bits"
        if _fits(both):
            _print(f"{title}, and {sizes}", both)
        else:
            _print(title, _table(grid, grid.text, kept=True))
            _print(sizes, _table(grid, grid.size, totals=False))
        OUT.print(f"{quantity.total} of the predicted losses: {grid.text()} {quantity.unit}")
    OUT.print(f"kept {plan.kept:.1%} of the bits of the targeted matrices{_besides(plan)}")
    print_warnings(plan)


def print_profile(plan: Plan, profile: Profile) -> None:
    """Print how far every matrix alone moves the model, and how well that was predicted."""
    for quantity, matrices in _by_quantity(plan):
        names = {m.name for m in matrices}
        real = {name: value for name, value in profile.divergences.items() if name in names}
        predicted = {
            name: value for name, value in _predicted(matrices, quantity).items() if name in real
        }
        grid, beside = Grid(matrices, real, NATS), Grid(matrices, predicted, quantity)
        title = f"measured divergence from the dense model, {NATS.unit}"
        both = _table(grid, grid.text, beside.text)
        if _fits(both):
            _print(f"{title}, and predicted", both)
        else:  # the table before shows what was predicted
            _print(title, _table(grid, grid.text))
        if any(m.group not in (None, m.name) for m in matrices):
            OUT.print("matrices that share a factor count as one, in the row of the first")
        correlation = spearman(*profile.compared(predicted))
        OUT.print(
            f"sum measured {grid.text()} {NATS.unit}, {quantity.total} predicted {beside.text()} "
            f"{quantity.unit}"
        )
        defined = "not defined" if correlation is None else f"{correlation:.3f}"
        OUT.print(f"rank correlation of measured and predicted (Spearman): {defined}")
    OUT.print(f"measured over {profile.tokens:,} tokens (--profile {profile.windows})")
    if profile.dense is not None:
        OUT.print(
            f"the loss of the tokens that follow, dense {profile.dense:.4f}, rises by "
            f"{sum(profile.rises.values()):.4f} {NATS.unit}, all matrices added"
        )


def _besides(plan: Plan) -> str:
    """Name what is counted and in no table: no loss is predicted of it."""
    named = [f"{m.name} as {m.scheme}" for m in plan.outside]
    return f", {' and '.join(named)} among them" if named else ""


def _by_quantity(plan: Plan) -> list[tuple[Quantity, list[Matrix]]]:
    """Part the matrices by what their methods can predict."""
    two_sided = {m.method for m in plan.matrices if m.predicted_nats is not None}
    parts = [
        (NATS, [m for m in plan.matrices if m.method in two_sided]),
        (SHARE, [m for m in plan.matrices if m.method not in two_sided]),
    ]
    return [(quantity, matrices) for quantity, matrices in parts if matrices]


def _predicted(matrices: list[Matrix], quantity: Quantity) -> dict[str, float]:
    """Return the predictions by name; what stays dense loses nothing."""
    known = {m.name: 0.0 if m.sizes is None else quantity.predicted(m) for m in matrices}
    return {name: value for name, value in known.items() if value is not None}


def _ends(values: Sequence[float]) -> list[float]:
    """Return the smallest and the largest value; nothing of nothing."""
    return [min(values), max(values)] if values else []


def _leaf(matrix: Matrix) -> str:
    return matrix.name.rpartition(".")[2]


def _print(title: str, table: Table) -> None:
    OUT.print(title, style="italic")  # as a title of the table it could be wider than that
    OUT.print(table)


def _table(
    grid: Grid,
    text: Callable[[int | None, str | None], str],
    beside: Callable[[int | None, str | None], str] = lambda layer, column: "",
    *,
    totals: bool = True,
    kept: bool = False,
) -> Table:
    """Lay out `text` of every place, with the text of `beside` next to it."""
    rows: list[int | None] = [*grid.layers]
    columns: list[str | None] = [*grid.columns]
    if totals:
        rows, columns = [*rows, None], [*columns, None]
    width = max(len(beside(row, column)) for row in rows for column in columns)

    def cell(layer: int | None, column: str | None) -> str:
        there = grid.at(layer, column)
        if layer is not None and there and all(m.sizes is None for m in there):
            return "dense"
        next_to = f" [dim]{beside(layer, column):>{width}}[/]" if width else ""
        return f"{text(layer, column)}{next_to}"

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
