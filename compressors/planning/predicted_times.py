"""Predicted times of the targeted matrices, and of a decoding step of the whole model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lrc.compressors.latency.latency_table import DENSE, LatencyTable, MissingTime, form_of
from lrc.compressors.layers import WeightConfig
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerTask


@dataclass(frozen=True)
class FormTime:
    """All matrices that are stored in one way."""

    form: str
    """Component types with pattern and integers, joined by ``+``; ``dense`` for dense ones."""
    weights: int
    seconds: float
    dense_seconds: float


@dataclass(frozen=True)
class PredictedTimes:
    """Seconds that the products with all targeted matrices take per step, one after the other."""

    device: str
    dtype: str
    rows: int
    threads: int | None
    forms: tuple[FormTime, ...]
    """Most time first; empty while an allocation is pending."""
    dense_seconds: float
    seconds: float
    """With the compressed matrices; the budget while an allocation is pending."""
    head_dense_seconds: float
    """Of the product with the output head, if it is quantized; else 0."""
    head_seconds: float
    slower_forms: dict[str, int]
    """Forms that are not faster than dense at any size and never chosen -> number of matrices."""
    pending: bool

    @property
    def ratio(self) -> float:
        """Time of the compressed matrices over that of the dense ones."""
        return self.seconds / self.dense_seconds

    @property
    def place(self) -> str:
        """Device, dtype and rows in words."""
        return LatencyTable(self.device, self.dtype, self.rows, self.threads, {}, {}).place

    def to_json(self) -> dict[str, Any]:
        """Return the section of the report."""
        values = vars(self) | {"forms": [vars(form) for form in self.forms]}
        del values["pending"]
        return values | {"ratio": self.ratio, "place": self.place}


def predicted_step(times: Mapping[str, Any], dense_step_seconds: float) -> float:
    """Predict the seconds of a decoding step of the compressed model.

    Everything but the products that are compressed is taken to last as long as in the dense model.

    Parameters
    ----------
    times : mapping
        As `PredictedTimes.to_json` returns them.
    dense_step_seconds : float
        Of a step of the dense model, measured for as many rows as the table.
    """
    dense = times["dense_seconds"] + times["head_dense_seconds"]
    rest = dense_step_seconds - dense
    return float(rest + times["seconds"] + times["head_seconds"])


def predicted_times(plan: Plan) -> PredictedTimes | None:
    """Return the times of a plan as executed, or as planned; None without measured times."""
    if plan.times is None:
        return None
    table, stages = plan.times.table, plan.times.stages
    tasks = [task for task in plan.tasks if task.stage in stages]
    pending = any(task.pending for task in tasks)
    dense = sum(len(task.weights) * table.dense(task.shape) for task in tasks)
    times = list(_times(plan, tasks))
    used = sum(nanoseconds for _, nanoseconds, _ in times)
    if pending:
        used += sum(a.budget for a in plan.allocations if a.stage in stages)
    forms: dict[str, list[tuple[int, int]]] = {}
    for form, *each in times:
        forms.setdefault(form, []).append((each[0], each[1]))
    rows = [
        FormTime(form, len(each), sum(t for t, _ in each) / 1e9, sum(d for _, d in each) / 1e9)
        for form, each in forms.items()
    ]
    heads = [task for task in plan.embeddings if task.name in plan.times.heads]
    slower: dict[str, int] = {}
    for task in tasks:
        for form in table.slower_forms(task.shape):
            slower[form] = slower.get(form, 0) + len(task.weights)
    return PredictedTimes(
        device=table.device,
        dtype=table.dtype,
        rows=table.rows,
        threads=table.threads,
        forms=tuple(sorted(rows, key=lambda row: -row.seconds)),
        dense_seconds=dense / 1e9,
        seconds=used / 1e9,
        head_dense_seconds=sum(table.dense(task.shape) for task in heads) / 1e9,
        head_seconds=sum(table.of(task.config) for task in heads) / 1e9,
        slower_forms=slower,
        pending=pending,
    )


def _times(plan: Plan, tasks: Iterable[LayerTask]) -> Iterator[tuple[str, int, int]]:
    """Yield form, time and dense time of every matrix that is decided."""
    assert plan.times is not None
    table = plan.times.table
    for task in tasks:
        if task.pending:
            continue
        config, dense = plan.stored_config(task), table.dense(task.shape)
        for _ in task.weights:
            yield _form(config), _time(table, config, dense), dense


def _time(table: LatencyTable, config: WeightConfig, dense: int) -> int:
    try:
        return table.of(config)
    except MissingTime:  # a fallback, such as from pivoted rows to two factors
        return dense


def _form(config: WeightConfig) -> str:
    return "+".join(form_of(component) for component in config.components) or DENSE
