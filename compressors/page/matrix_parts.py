"""Sections about single matrices: bytes, ranks, bits and losses."""

from collections.abc import Callable
from dataclasses import dataclass

from lrc.compressors.compress.profile import rank_correlation
from lrc.compressors.page import charts
from lrc.compressors.page.charts import Bar
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.heat_maps import heat_map, kinds_map
from lrc.compressors.page.matrices import Matrix, grid_of, labels, matrices_of, mean
from lrc.compressors.page.number_text import nats_text, percent_text
from lrc.compressors.page.parts import Part, Table, Text, figures, tables
from lrc.compressors.page.saved_runs import SavedRun
from lrc.configs.size import size_text

NATS = "nats per token"
OTHER = "other tensors"


@dataclass(frozen=True)
class Quantity:
    """A heat map: what it shows, and how the matrices of one cell are combined."""

    title: str
    unit: str
    value: Callable[[Matrix], float | None]
    combine: Callable[[list[float]], float]
    caption: str
    logarithmic: bool = False


QUANTITIES = (
    Quantity("Rank", "", lambda m: m.rank, mean, "Ranks of low-rank matrices."),
    Quantity(
        "Size",
        "bits per weight",
        lambda m: m.bits_per_weight,
        mean,
        "Stored bits, divided by the number of entries of the matrix.",
    ),
    Quantity(
        "Predicted loss increase",
        NATS,
        lambda m: m.predicted_nats,
        sum,
        "From second moments of inputs and of output gradients.",
        logarithmic=True,
    ),
    Quantity(
        "Relative error",
        "%",
        lambda m: None if m.relative_error is None else 100 * m.relative_error,
        mean,
        "Weighted squared error, divided by that of replacing the matrix by zero.",
        logarithmic=True,
    ),
)


def bytes_by_place(run: SavedRun, page: Page) -> list[Part]:
    """Return where the bytes go: by projection and by decoder layer."""
    matrices = matrices_of(run.report)
    if not matrices:
        return []
    names = labels(matrices)
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault(names[matrix.projection], []).append(matrix)
    total = run.report["size"]["model"]["tensor_bytes"]
    targeted = run.report["size"]["targeted"]
    rest = Bar(
        OTHER,
        total["dense"] - targeted["dense_bits"] / 8,
        total["compressed"] - targeted["bits"] / 8,
    )
    bars = [*(_bar(name, group) for name, group in groups.items()), rest]
    layers = sorted({m.layer for m in matrices if m.layer is not None})
    by_layer = [_bar(str(layer), [m for m in matrices if m.layer == layer]) for layer in layers]
    rows = [
        [
            bar.label,
            str(len(groups[bar.label])) if bar.label in groups else "",
            size_text(bar.dense),
            size_text(bar.stored),
            percent_text(bar.stored / bar.dense) if bar.dense else "",
        ]
        for bar in bars
    ]
    title = "Bytes by projection"
    # After slicing, the dense targeted matrices are those of the sliced model.
    sliced = ", and what slicing has removed" if run.report["slices"] else ""
    embedded = any(matrix.layer is None for matrix in matrices)
    others = "norms" if embedded else "embedding and norms"
    return [
        *figures(
            (
                charts.bytes_by_part(page, title, bars),
                "Stored bytes by projection, over all layers, and the percentage kept. Other "
                f"tensors are those that are not targeted, such as {others}{sliced}.",
            ),
            (
                charts.bytes_by_layer(page, layers, by_layer),
                "Stored bytes of the targeted matrices by decoder layer.",
            )
            if layers
            else None,
        ),
        *tables(title, ["", "matrices", "dense", "compressed", "kept"], rows),
    ]


def _bar(name: str, group: list[Matrix]) -> Bar:
    return Bar(name, sum(m.dense_bits for m in group) / 8, sum(m.bits for m in group) / 8)


def matrices(run: SavedRun, page: Page) -> list[Part]:
    """Return rank, bits and predicted loss of every matrix."""
    found = matrices_of(run.report)
    if not found:
        return []
    maps = (_kinds(page, found), *(_map(page, found, quantity) for quantity in QUANTITIES))
    predicted = [m.predicted_nats for m in found if m.predicted_nats is not None]
    total = f"The predicted loss increases sum to {nats_text(sum(predicted))} {NATS}."
    return [
        Text(
            "One cell for every matrix; stronger colors are larger values, of losses and errors on "
            f"a logarithmic scale. Empty cells have no such value. {total if predicted else ''}"
        ),
        *figures(*maps),
        _table(found),
    ]


def _map(page: Page, found: list[Matrix], quantity: Quantity) -> tuple[str, str] | None:
    grid = grid_of(found, quantity.value, quantity.combine)
    if not grid.cells:
        return None
    title, unit, logarithmic = quantity.title, quantity.unit, quantity.logarithmic
    return heat_map(page, title, unit, grid, logarithmic=logarithmic), quantity.caption


def _kinds(page: Page, found: list[Matrix]) -> tuple[str, str] | None:
    """Return a map of the component types and integers, if there are several."""
    kinds = sorted({_kind(m) for m in found if m.layer is not None})
    if len(kinds) < 2:
        return None
    grid = grid_of(found, lambda m: kinds.index(_kind(m)), max)
    return kinds_map(page, "How matrices are stored", grid, kinds), "Component types and schemes."


def _kind(matrix: Matrix) -> str:
    quantization = matrix.config.quantization
    if not matrix.config.compressed:
        return "as in the source"
    return matrix.config.types + ("" if quantization is None else f" {quantization}")


def _table(found: list[Matrix]) -> Table:
    def optional(value: float | None, write: Callable[[float], str]) -> str:
        return "" if value is None else write(value)

    rows = [
        [
            m.name,
            f"{m.config.shape[0]} x {m.config.shape[1]}",
            m.method,
            _kind(m),
            optional(m.rank, lambda rank: f"{rank:.0f}"),
            f"{m.bits_per_weight:.2f}",
            percent_text(m.bits / m.dense_bits),
            optional(m.relative_error, lambda error: f"{100 * error:.3g} %"),
            optional(m.predicted_nats, nats_text),
            m.remark,
        ]
        for m in found
    ]
    head = ["matrix", "shape", "method", "stored as", "rank", "bits per weight", "kept"]
    head += ["relative error", f"predicted {NATS}", "remark"]
    return Table(f"All {len(found)} matrices", head, rows, folded=True)


def profile(run: SavedRun, page: Page) -> list[Part]:
    """Return predictions next to what `lrc plan --profile` has measured."""
    measured = run.report.get("profile")  # not in reports of all versions
    if measured is None:
        return []
    found = matrices_of(run.report)
    names = labels(found)
    in_nats = any(m.predicted_nats is not None for m in found)
    unit = NATS if in_nats else "relative error"
    groups: dict[str, list[tuple[float, float]]] = {}
    for matrix in found:
        predicted = matrix.predicted_nats if in_nats else matrix.relative_error
        real = measured["divergences"].get(matrix.name)
        # Logarithmic axes; rounding may make a tiny divergence negative.
        if predicted is not None and real is not None and predicted > 0 and real > 0:
            groups.setdefault(names[matrix.projection], []).append((predicted, real))
    numbers = [pair for values in groups.values() for pair in values]
    if not numbers:
        return []
    title = "Predicted and measured loss of single matrices"
    rank = rank_correlation([x for x, _ in numbers], [y for _, y in numbers])
    correlation = "" if rank is None else f" Their rank correlation (Spearman) is {rank:.3f}."
    text = (
        f"Divergence from the dense model if a single matrix is replaced, over "
        f"{measured['tokens']:,} calibration tokens, without compensation. The sum over "
        f"{len(measured['divergences'])} matrices is "
        f"{nats_text(sum(measured['divergences'].values()))} {NATS}.{correlation}"
    )
    figure = charts.predicted_and_measured(page, title, unit, [*groups.items()])
    return [Text(text), *figures((figure, f"{title}."))]


def latency(run: SavedRun, page: Page) -> list[Part]:
    """Return the predicted times of the products."""
    times = run.report["latency"]
    if times is None:
        return []
    rows = [
        [
            each["form"],
            str(each["weights"]),
            f"{1e3 * each['dense_seconds']:.3g} ms",
            f"{1e3 * each['seconds']:.3g} ms",
            percent_text(each["seconds"] / each["dense_seconds"]),
        ]
        for each in times["forms"]
    ]
    rows.append(
        [
            "all targeted matrices",
            str(sum(each["weights"] for each in times["forms"])),
            f"{1e3 * times['dense_seconds']:.3g} ms",
            f"{1e3 * times['seconds']:.3g} ms",
            percent_text(times["ratio"]),
        ]
    )
    caption = f"Predicted time of the products per step, by form, on {times['place']}"
    return tables(caption, ["form", "matrices", "dense", "compressed", "of dense"], rows)
