"""The matrices of a report, ordered by decoder layer and projection."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from lrc.compressors.layers import WeightConfig

NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Matrix:
    """One record of ``layers`` in a report."""

    name: str
    layer: int | None
    """Number of the decoder layer; None for embedding and head."""
    projection: str
    """Name within the layer, with numbers of experts replaced by ``*``."""
    method: str
    config: WeightConfig
    bits: int
    dense_bits: int
    relative_error: float | None
    predicted_nats: float | None
    remark: str
    """Why it stays dense, and deviations from the plan."""

    @property
    def rank(self) -> int | None:
        """Rank of a low-rank matrix."""
        return self.config.sizes.get("rank")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, divided by the number of entries of the matrix."""
        return self.bits / prod(self.config.shape)


def matrices_of(report: Mapping[str, Any]) -> list[Matrix]:
    """Return the matrices of a report, in its order."""
    return [_matrix(record) for record in report["layers"]]


def _matrix(record: Mapping[str, Any]) -> Matrix:
    name = record["name"]
    found = NUMBER.search(name)
    inner = name if found is None else name[found.end() :]
    config = WeightConfig.from_json(record["config"])
    remarks = (record["note"], record["fallback"])
    return Matrix(
        name=name,
        layer=None if found is None else int(found[1]),
        projection=re.sub(r"\.\d+(?=\.|$)", ".*", inner),
        method=record["method"],
        config=config,
        bits=record["bits"],
        dense_bits=record["dense_bits"],
        relative_error=record["relative_error"],
        # Of a group that shares a factor, every record has the sum, which counts once.
        predicted_nats=None if config.shares else record["predicted_nats"],
        remark="; ".join(map(str, filter(None, remarks))),
    )


def labels(matrices: Iterable[Matrix]) -> dict[str, str]:
    """Return a short label for every projection: its last name, if that is unambiguous."""
    projections = list(dict.fromkeys(m.projection for m in matrices))
    last = [each.rpartition(".")[2] for each in projections]
    return {
        each: short if last.count(short) == 1 else each
        for each, short in zip(projections, last, strict=True)
    }


@dataclass(frozen=True)
class Grid:
    """Values by decoder layer (row) and projection (column); places without a value are absent."""

    rows: list[int]
    columns: list[str]
    cells: dict[tuple[int, str], float]


def grid_of(
    matrices: Iterable[Matrix],
    value: Callable[[Matrix], float | None],
    combine: Callable[[list[float]], float],
) -> Grid:
    """Arrange values of the matrices in decoder layers; `combine` those that share a place."""
    inside = [m for m in matrices if m.layer is not None]
    names = labels(inside)
    found: dict[tuple[int, str], list[float]] = {}
    for matrix in inside:
        number = value(matrix)
        if number is not None and matrix.layer is not None:
            found.setdefault((matrix.layer, names[matrix.projection]), []).append(number)
    return Grid(
        rows=sorted({m.layer for m in inside if m.layer is not None}),
        columns=list(names.values()),
        cells={place: combine(values) for place, values in found.items()},
    )


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)
