"""A table of the times of products, and its JSON file.

A table holds for one device, dtype and number of input rows. A key is the shape of a matrix and its
form: ``dense`` for a matrix in the dtype of the table, else the component type, its pattern and its
integers, such as ``low_rank int4-g64``. The time of a sum of components is the sum of their times.

Between the measured ranks, numbers of entries and so on, a `TimeCurve` interpolates. Layers that
share a factor are priced as if each had its own, because each of them multiplies by it. That the
first factors of layers with a common input may be multiplied in one product is not taken into
account.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lrc.compressors.latency.time_curve import TimeCurve
from lrc.compressors.layers import COMPONENTS, ComponentConfig, WeightConfig

TABLE_VERSION = 1
"""Raised when a key changes its meaning or is removed."""
KIND = "lrc latency table"
DENSE = "dense"
MAX_BYTES = 10**8
"""A larger file was named by mistake."""
LARGEST = 2**63 - 1
"""Of the numbers in the file."""
Shape = tuple[int, int]
Key = tuple[Shape, str]
"""Shape ``(d_out, d_in)`` and form."""


def form_of(component: ComponentConfig) -> str:
    """Return how a component is stored, without its sizes.

    >>> form_of(ComponentConfig("sparse", {"nonzeros": 9}, pattern="2:4"))
    'sparse 2:4'
    """
    args = None if component.quantization is None else str(component.quantization)
    return " ".join(filter(None, (component.type, component.pattern, args)))


def main_size(component: ComponentConfig) -> int:
    """Return the size that the time depends on: of dictionaries the atoms; 0 if there is none.

    The number of coefficients of a dictionary is not taken into account: the product is computed
    with their zeros.
    """
    names = COMPONENTS[component.type].SIZES
    return component.sizes[names[0]] if names else 0


@dataclass(frozen=True)
class Product:
    """A product whose time is needed."""

    shape: Shape
    component: ComponentConfig | None = None
    """None for the dense matrix."""

    @property
    def form(self) -> str:
        """How the matrix is stored."""
        return DENSE if self.component is None else form_of(self.component)

    @property
    def size(self) -> int:
        """The size that the time depends on."""
        return 0 if self.component is None else main_size(self.component)

    @property
    def key(self) -> Key:
        """Where its times are in a table."""
        return self.shape, self.form


class MissingTime(KeyError):
    """A table has no time of a product; `key` is its key."""

    def __init__(self, key: Key) -> None:
        super().__init__(f"no times of {describe(key)}")
        self.key = key


def describe(key: Key) -> str:
    """Return the words for a key.

    >>> describe(((64, 32), "dense int8"))
    'dense int8 [64, 32]'
    """
    (d_out, d_in), form = key
    return f"{form} [{d_out}, {d_in}]"


@dataclass(frozen=True)
class LatencyTable:
    """Times of products in nanoseconds."""

    device: str
    """Name of the processor or the GPU."""
    dtype: str
    """Of inputs and outputs, such as ``float32``."""
    rows: int
    """Of the input: tokens per step."""
    threads: int | None
    """Of the processor; None on a GPU."""
    versions: Mapping[str, str]
    """Of lrc and torch."""
    curves: Mapping[Key, TimeCurve]

    def dense(self, shape: Shape) -> int:
        """Return the time of a dense matrix.

        Raises
        ------
        MissingTime
        """
        return self._curve(shape, DENSE).at(0)

    def of(self, config: WeightConfig) -> int:
        """Return the time of a weight, dense or a sum of components.

        Raises
        ------
        MissingTime
        """
        if not config.components:
            return self.dense(config.shape)
        return sum(
            self._curve(config.shape, form_of(each)).at(main_size(each))
            for each in config.components
        )

    def _curve(self, shape: Shape, form: str) -> TimeCurve:
        try:
            return self.curves[shape, form]
        except KeyError:
            raise MissingTime((shape, form)) from None

    def missing(self, products: Iterable[Product]) -> list[Key]:
        """Return the keys of products without times."""
        needed = dict.fromkeys(product.key for product in products)
        return [key for key in needed if key not in self.curves]

    def only(self, products: Iterable[Product]) -> "LatencyTable":
        """Return the table with the times of these kinds of products alone."""
        needed = {product.key for product in products}
        return replace(self, curves={k: c for k, c in self.curves.items() if k in needed})

    def slower_forms(self, shape: Shape) -> list[str]:
        """Return the forms that are not faster than the dense matrix at any measured size."""
        dense = self.dense(shape)
        return [
            form
            for (each, form), curve in self.curves.items()
            if each == shape and form != DENSE and curve.least >= dense
        ]

    @property
    def place(self) -> str:
        """Device, dtype and rows in words."""
        threads = "" if self.threads is None else f", {self.threads} thread"
        threads += "s" if (self.threads or 1) > 1 else ""
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''}"
        return f"{self.device} ({self.dtype}, {rows}{threads})"

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the inverse of `from_json`."""
        entries = [
            {
                "shape": list(shape),
                "form": form,
                "sizes": list(curve.sizes),
                "nanoseconds": list(curve.nanoseconds),
            }
            for (shape, form), curve in self.curves.items()
        ]
        return {
            "kind": KIND,
            "version": TABLE_VERSION,
            "device": self.device,
            "dtype": self.dtype,
            "rows": self.rows,
            "threads": self.threads,
            "versions": dict(self.versions),
            "entries": entries,
        }

    @classmethod
    def from_json(cls, values: Any) -> "LatencyTable":
        """Read the JSON values of `to_json`.

        Raises
        ------
        ValueError
            If they are something else, of another version, or damaged.
        """
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise ValueError("is not a latency table")
        if values.get("version") != TABLE_VERSION:
            got = values.get("version")
            raise ValueError(f"'version' must be {TABLE_VERSION}, got {got!r:.60}")
        threads, versions = values.get("threads"), values.get("versions")
        right = (
            all(isinstance(values.get(key), str) for key in ("device", "dtype"))
            and _whole(values.get("rows"), 1)
            and (threads is None or _whole(threads, 1))
            and isinstance(versions, dict)
            and all(isinstance(each, str) for each in versions.values())
            and isinstance(values.get("entries"), list)
        )
        if not right:
            raise ValueError(
                "must have strings 'device' and 'dtype', whole numbers 'rows' and 'threads', a "
                "mapping 'versions' and a list 'entries'"
            )
        curves = {}
        for number, entry in enumerate(values["entries"]):
            try:
                key, curve = _entry(entry)
            except ValueError as error:
                raise ValueError(f"entries[{number}]: {error}") from None
            if key in curves:
                raise ValueError(f"entries[{number}]: {describe(key)} is listed twice")
            curves[key] = curve
        keys = ("device", "dtype", "rows", "threads", "versions")
        return cls(**{key: values[key] for key in keys}, curves=curves)


def read_table(path: str) -> LatencyTable:
    """Read the file of a table.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not a table of this version.
    """
    with Path(path).expanduser().open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES:,} bytes")
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    return LatencyTable.from_json(values)


def _entry(entry: Any) -> tuple[Key, TimeCurve]:
    if not isinstance(entry, dict):
        raise ValueError(f"must be a mapping, got {entry!r:.60}")
    shape, form = entry.get("shape"), entry.get("form")
    sizes, times = entry.get("sizes"), entry.get("nanoseconds")
    if not (isinstance(shape, list) and len(shape) == 2 and all(_whole(n, 1) for n in shape)):
        raise ValueError(f"'shape' must be [d_out, d_in], got {shape!r:.60}")
    if not isinstance(form, str) or not form:
        raise ValueError(f"'form' must be a string such as 'dense int8', got {form!r:.60}")
    for key, found, least in (("sizes", sizes, 0), ("nanoseconds", times, 1)):
        if not (isinstance(found, list) and all(_whole(n, least) for n in found)):
            raise ValueError(f"{key!r} must be whole numbers from {least}, got {found!r:.60}")
    assert isinstance(sizes, list)
    assert isinstance(times, list)
    return ((shape[0], shape[1]), form), TimeCurve(tuple(sizes), tuple(times))


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= LARGEST
