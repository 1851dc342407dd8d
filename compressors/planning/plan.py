"""The plan of a run: tasks, budgets and results, with one exact serialization.

`compile_plan` creates it from a recipe and the shapes of a model, `allocate` completes what depends
on statistics, and compression adds the results. plan.json, the journal and checkpoints store the
output of `Plan.to_json`, which `Plan.from_json` reads back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from lrc.compressors.latency.latency_table import LatencyTable
from lrc.compressors.layers import WeightConfig
from lrc.compressors.planning.draft_speed import PredictedPair
from lrc.compressors.planning.measures import Latency, MeasureField
from lrc.compressors.planning.tasks import ArgsField, LayerResult, LayerTask

TableField = Annotated[
    LatencyTable,
    PlainValidator(lambda v: v if isinstance(v, LatencyTable) else LatencyTable.from_json(v)),
    PlainSerializer(lambda table: table.to_json()),
]

PLAN_VERSION = 2
"""Raised when a key changes its meaning or is removed."""


@dataclass(frozen=True)
class Allocation:
    """A budget for all pending tasks of one stage, and the choices that may be made within it."""

    stage: int
    """Index of the stage in the recipe."""
    allocator: Literal["lagrangian", "heavy-tail"]
    budget: int
    """Upper limit of the total cost of the pending tasks."""
    measure: MeasureField
    types: tuple[str, ...]
    """Sums of component types to choose from."""
    quantization: tuple[ArgsField, ...] = ()
    """Integers to choose from, in addition to the dtype of the model."""
    ratios: tuple[float, ...] = (2.0,)
    """Atoms per coefficient to choose from."""
    rank_multiple: int = 1
    group_multiple: int = 1
    """The part of `rank_multiple` that the group sizes of later quantization require."""
    min_keep: float = 0.0
    max_relative_error: float = 1.0
    keep: float | None = None
    size: str | None = None
    """The budget as the recipe states it."""
    total: int = 0
    """Cost of all dense weights of the stage."""
    overrides: bool = False
    """Whether the recipe fixes the budgets of some weights."""
    one_scheme: bool = False
    """Whether layers that serving engines fuse get the same scheme."""
    elastic: tuple[float, ...] = ()
    """All budgets of an elastic checkpoint, as the recipe states them; `keep` is the first."""
    drafter: tuple[float, ...] = ()
    """Budgets, the largest first, of which the fastest drafter is chosen."""

    @property
    def key(self) -> str:
        """Key of the budget in the recipe."""
        if self.elastic or self.drafter:
            return "elastic" if self.elastic else "drafter"
        return "size" if self.keep is None else "keep"

    @property
    def all_budgets(self) -> "list[Allocation]":
        """The same allocation with each of the budgets, from this one on."""
        several = self.elastic or self.drafter
        if not several:
            return [self]
        assert self.keep is not None
        fixed = int(self.keep * self.total) - self.budget
        return [replace(self, keep=keep, budget=int(keep * self.total) - fixed) for keep in several]


@dataclass(frozen=True)
class UnchangedPart:
    """A module next to the language model, such as a vision tower, which no stage changes."""

    name: str
    kind: str
    """Name of its class."""
    bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """The model that is compressed, after slicing."""

    source: str
    dtype: str
    architecture: str
    parameters: int
    """Of the whole model; tied ones once."""
    bytes: int
    """Of the tensors of the whole model."""
    source_file_bytes: int | None
    """Size of the weights as the source stores them, which may be quantized; None if unknown."""
    source_quantized: bool
    unchanged: list[UnchangedPart] = field(default_factory=list)
    auto_class: str = "AutoModelForCausalLM"
    """Name of the class of transformers that loads the result."""


@dataclass(frozen=True)
class SliceRecord:
    """A slicing stage: sizes of the whole model before and after it."""

    stage: int
    method: str
    options: Mapping[str, Any]
    """Options of the stage in the recipe."""
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    config: dict[str, list[Any]]
    """Keys of config.json that change, with their values before and after."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Decisions that depend on data."""


@dataclass(frozen=True)
class TrainingRecord:
    """A stage that trains stored numbers: its budget and, once it has run, the result."""

    stage: int
    """Index of the stage in the recipe."""
    kind: str
    """Key of the stage in the registry."""
    method: str
    options: Mapping[str, Any]
    """Options of the stage in the recipe."""
    steps: int | None
    """None if time is limited, see `minutes`."""
    tokens: int | None
    """Training tokens; None if time is limited."""
    passes: float
    """Cost of a token in forward passes over the layers, to estimate the time."""
    minutes: float | None = None
    """Limit of the time; None if the number of steps is given."""
    added_bytes: int = 0
    """Of the low-rank components that it adds if the result is used; an upper limit while
    allocations are pending."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was trained on what, and the losses; empty before it has run."""


@dataclass(frozen=True)
class ProductTimes:
    """Times of the products of a model, where stages have ``measure: latency``."""

    stages: tuple[int, ...]
    """Indices of these stages in the recipe."""
    table: TableField
    """Of the products that the stages may choose from."""
    heads: tuple[str, ...] = ()
    """Tasks among `Plan.embeddings` that multiply: output heads, or embeddings tied to one."""


@dataclass(frozen=True)
class Experts:
    """The experts of a model that has any."""

    layers: int
    """Number of layers with experts."""
    experts: int
    """In each of these layers."""
    per_token: int
    """How many of them the router selects for a token."""
    needed: int
    """Calibration tokens that an expert needs for its statistics; 0 if none are collected."""

    def expected(self, tokens: int) -> float:
        """Return how many tokens an expert receives if the router favours none."""
        return tokens * self.per_token / self.experts


def with_times(allocations: Iterable[Allocation], times: ProductTimes | None) -> list[Allocation]:
    """Return allocations that count time by the table of `times`, if they count time."""
    if times is None:
        return [*allocations]
    latency = Latency(times.table)
    return [
        replace(each, measure=latency) if isinstance(each.measure, Latency) else each
        for each in allocations
    ]


@dataclass(frozen=True)
class Plan:
    """Everything that will be done, and what is known about the result so far."""

    model: ModelInfo
    seed: int
    calibration: Mapping[str, Any]
    """The calibration section of the recipe."""
    tasks: list[LayerTask]
    """One per group of targeted linear layers, in the order of the model."""
    embeddings: list[LayerTask] = field(default_factory=list)
    """Input embedding and output head, where they are quantized."""
    allocations: list[Allocation] = field(default_factory=list)
    slices: list[SliceRecord] = field(default_factory=list)
    training: list[TrainingRecord] = field(default_factory=list)
    """Stages that train, in order."""
    user_plans: Mapping[int, str] = field(default_factory=dict)
    """SHA-256 of the plan file that a stage was given, by the index of the stage."""
    warnings: list[str] = field(default_factory=list)
    results: dict[str, LayerResult] = field(default_factory=dict)
    """By the name of the task."""
    elastic: tuple[float, ...] = ()
    """Budgets that the checkpoint can be cut to, the stored one first; empty if there are none."""
    pairs: tuple[PredictedPair, ...] = ()
    """Predicted speeds of the budgets in `drafter`; empty before the allocation."""
    times: ProductTimes | None = None
    """None without ``measure: latency``, and before the times have been measured."""
    experts: Experts | None = None
    version: Literal[2] = 2

    @property
    def all_tasks(self) -> list[LayerTask]:
        """Tasks of the layers, then those of embedding and head."""
        return [*self.tasks, *self.embeddings]

    @property
    def dense_bits(self) -> int:
        """Size of the dense targeted matrices."""
        return sum(task.dense_bits for task in self.all_tasks)

    @property
    def bits(self) -> int:
        """Size of the targeted matrices as they will be, or are, stored."""
        return sum(self._stored(task).bits for task in self.all_tasks)

    @property
    def kept(self) -> float:
        """Ratio of `bits` to `dense_bits`; 1 if nothing is targeted."""
        return self.bits / self.dense_bits if self.dense_bits else 1.0

    @property
    def dense_parameters(self) -> int:
        """Parameters of the source model."""
        return self.slices[0].parameters[0] if self.slices else self.model.parameters

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensors of the source model in the dtype of the recipe."""
        return self.slices[0].bytes[0] if self.slices else self.model.bytes

    @property
    def compressed_parameters(self) -> int:
        """Parameters of the compressed model; an estimate while allocations are pending."""
        removed = sum(
            task.dense_bits // task.number_bits - self._stored(task).parameters
            for task in self.all_tasks
        )
        return self.model.parameters - removed

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the tensors of the compressed model."""
        return self.model.bytes - (self.dense_bits - self.bits) // 8

    @property
    def unmeasured(self) -> bool:
        """Whether a budget is in time and the times have yet to be measured."""
        return any(each.measure.provisional for each in self.allocations)

    def stored_config(self, task: LayerTask) -> WeightConfig:
        """Return the configuration of a task as executed, or as planned."""
        return self.results[task.name].config if task.name in self.results else task.config

    def _stored(self, task: LayerTask) -> LayerTask:
        return task if task.pending else replace(task, config=self.stored_config(task))

    def owner_layers(self) -> dict[str, int]:
        """Return the layer in whose file the results of each weight are stored."""
        return {w.name: task.layer for task in self.all_tasks for w in task.weights}

    def modules(self) -> dict[str, WeightConfig]:
        """Return the configuration of every compressed layer by name."""
        return {
            weight.name: task.config_of(weight, self.stored_config(task))
            for task in self.all_tasks
            for weight in task.weights
            if self.stored_config(task).compressed
        }

    def with_tasks(self, changed: Iterable[LayerTask]) -> "Plan":
        """Return the plan with some tasks replaced, by name."""
        by_name = {task.name: task for task in changed}
        tasks, embeddings = (
            [by_name.get(task.name, task) for task in each]
            for each in (self.tasks, self.embeddings)
        )
        return replace(self, tasks=tasks, embeddings=embeddings)

    def with_results(self, results: Mapping[str, LayerResult]) -> "Plan":
        """Return the plan with added or replaced results, by the name of the task."""
        return replace(self, results={**self.results, **results})

    def to_json(self) -> dict[str, Any]:
        """Return JSON values with totals, which `from_json` ignores."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json")
        values["totals"] = {
            "kept": self.kept,
            "bits": self.bits,
            "dense_bits": self.dense_bits,
            "dense_parameters": self.dense_parameters,
            "dense_bytes": self.dense_bytes,
            "compressed_parameters": self.compressed_parameters,
            "compressed_bytes": self.compressed_bytes,
        }
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_json` wrote.

        Raises
        ------
        ValueError
            If the values are not those of a plan.
        """
        plan = _adapter().validate_python({k: v for k, v in values.items() if k != "totals"})
        return replace(plan, allocations=with_times(plan.allocations, plan.times))


@cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)
