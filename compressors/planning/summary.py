"""The rows that tables and reports show of a plan, one for every weight."""

from dataclasses import dataclass
from math import prod
from typing import Any

from lrc.compressors.layers import WeightConfig
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerResult, LayerTask, Weight


@dataclass(frozen=True)
class WeightSummary:
    """A weight as planned, or as executed if there are results."""

    name: str
    layer: int
    shape: tuple[int, int]
    stage: int
    method: str
    config: WeightConfig
    bits: int
    dense_bits: int
    owner: str
    """Name of its task: of the weight that stores the factor if one is shared."""
    allocator: str | None
    """The allocator that is going to choose the configuration."""
    note: str | None
    result: LayerResult

    @property
    def rank(self) -> int | None:
        """Rank of a low-rank weight."""
        return self.config.sizes.get("rank")

    def to_json(self) -> dict[str, Any]:
        """Return the record of the report."""
        return {
            "name": self.name,
            "stage": self.stage,
            "method": self.method,
            "config": self.config.to_json(),
            "bits": self.bits,
            "dense_bits": self.dense_bits,
            "relative_error": self.result.relative_error,
            "predicted_nats": self.result.predicted_nats,
            "refit": self.result.refit,
            "note": self.note,
            "fallback": self.result.fallback,
        }


def summarize(plan: Plan) -> list[WeightSummary]:
    """Return one row for every targeted matrix, those of embedding and head last.

    Weights of groups are ordered by layer, as in the model.
    """
    rows = [_row(plan, task, weight) for task in plan.all_tasks for weight in task.weights]
    return sorted(rows, key=lambda row: row.layer)


def _row(plan: Plan, task: LayerTask, weight: Weight) -> WeightSummary:
    config = plan.stored_config(task)
    even = task.bits // len(task.weights)
    return WeightSummary(
        name=weight.name,
        layer=weight.layer,
        shape=task.shape,
        stage=task.stage,
        method=task.method,
        config=task.config_of(weight, config),
        bits=even if task.pending else task.weight_bits(weight, config),
        dense_bits=prod(task.shape) * task.number_bits,
        owner=task.name,
        allocator=None if task.allocation is None else plan.allocations[task.allocation].allocator,
        note=task.note if not config.compressed else None,
        result=plan.results.get(task.name, LayerResult(config)),
    )
