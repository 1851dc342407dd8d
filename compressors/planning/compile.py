"""Compile a recipe into a plan, from the shapes of the model only; no weight is read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Protocol

from torch import nn

from lrc.compressors.latency.latency_table import LatencyTable, Product
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.source import Source
from lrc.compressors.planning.coverage import check_expected, describe_experts
from lrc.compressors.planning.needed_products import Choices, needed_products
from lrc.compressors.planning.plan import (
    Allocation,
    ModelInfo,
    Plan,
    ProductTimes,
    SliceRecord,
    TrainingRecord,
    UnchangedPart,
    with_times,
)
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.required_statistics import solver_statistics, with_statistics
from lrc.compressors.planning.serving import PlannedWeights, check_served, serving_warnings
from lrc.compressors.planning.size_budget import WholeModel
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.recipe import Recipe


@dataclass
class Draft:
    """An incomplete plan, to which the stages of a recipe add one after the other."""

    source: Source
    architecture: Architecture
    """Of the model after the slicing stages so far."""
    seed: int
    tokens: int
    """Calibration tokens."""
    window: int
    """Tokens per calibration window."""
    problems: Problems = field(default_factory=Problems)
    tasks: dict[str, LayerTask] = field(default_factory=dict)
    """By the name of each weight."""
    embeddings: list[LayerTask] = field(default_factory=list)
    embedding_keys: dict[str, int] = field(default_factory=dict)
    """``embeddings`` or ``lm_head`` -> index of the stage that requests it."""
    allocations: list[Allocation] = field(default_factory=list)
    slices: list[SliceRecord] = field(default_factory=list)
    training: list[TrainingRecord] = field(default_factory=list)
    sliced: list[Any] = field(default_factory=list)
    """Configs of the model after each slicing stage."""
    user_plans: dict[int, str] = field(default_factory=dict)
    """Texts of plan files by stage."""
    table: LatencyTable | None = None
    """Times for stages with a budget in time; None if there are none, or they are not measured."""
    products: list[Product] = field(default_factory=list)
    """Whose times these stages need."""
    timed: list[int] = field(default_factory=list)
    """Indices of these stages."""
    warnings: list[str] = field(default_factory=list)
    group_multiple: int = 1
    """Ranks must be multiples of it so that later stages can quantize them in groups."""
    compensates: bool = False
    """Whether a stage compensates errors."""
    quantizes_linears: bool = False
    """Whether a later stage quantizes linear layers."""
    elastic: tuple[float, ...] = ()
    """Budgets that the checkpoint can be cut to, if there are several."""
    served: dict[str, str] = field(default_factory=dict)
    """Path of a key `serve` -> engine for which the checkpoint is planned."""
    sized: bool = False
    """Whether a stage has a budget in bytes, which embeddings may suffice to meet."""
    no_saving_advice: str | None = None
    """Ending of the error raised if the plan makes nothing smaller; None without decomposition."""
    executed_slices: bool = False
    """Whether the slicing stages have been carried out; `architecture` is then their result."""

    @property
    def number_bits(self) -> int:
        """Bits of one number in the dtype of the model."""
        return self.source.dtype.itemsize * 8

    @property
    def heads(self) -> list[LayerTask]:
        """The tasks among `embeddings` whose matrix is multiplied by."""
        model, tied = self.architecture.model, self.architecture.tied.values()
        return [
            task
            for task in self.embeddings
            if f"{task.name}.weight" in tied
            or isinstance(model.get_submodule(task.name), nn.Linear)
        ]

    @property
    def head_products(self) -> list[Product]:
        """The products with the output head, if it is quantized and times are needed."""
        return needed_products(self.heads, Choices(())) if self.timed else []

    @property
    def all_products(self) -> list[Product]:
        """The products whose times are needed."""
        return [*self.products, *self.head_products]

    @property
    def whole(self) -> WholeModel:
        """Sizes of the model as far as it is known."""
        return WholeModel(self.architecture.stored_parameters(), self.embeddings)


class StageCompiler(Protocol):
    """A kind of stage in compilation; `stages` are its options by index in the recipe."""

    def announce(self, draft: Draft, stages: Mapping[int, Any]) -> None:
        """Record what earlier stages must know, before any stage is compiled."""

    def compile(self, draft: Draft, stages: Mapping[int, Any]) -> None:
        """Add the stages of this kind to the draft."""


@dataclass(frozen=True)
class Compiled:
    """A plan, and what later phases need besides it."""

    plan: Plan
    architecture: Architecture
    """Of the model that is decomposed."""
    sliced: list[Any]
    """Configs of the model after each slicing stage."""
    user_plans: Mapping[int, str]
    """Texts of the given plan files by stage."""
    products: list[Product]
    """Whose times the stages with a budget in time need."""


def compile_plan(
    recipe: Recipe,
    source: Source,
    architecture: Architecture,
    kinds: Mapping[str, StageCompiler],
    slices: list[SliceRecord] | None = None,
    *,
    table: LatencyTable | None = None,
) -> Compiled:
    """Decide what happens to every weight.

    Parameters
    ----------
    kinds : mapping of str to StageCompiler
        The registry of stages, in pipeline order.
    slices : list of SliceRecord, optional
        Slicing stages that have been carried out; `architecture` is then their result.
    table : LatencyTable, optional
        Measured times, if stages have a budget in time and name no table.

    Raises
    ------
    RecipeError
        With all problems: patterns without a match, weights claimed twice, ranks that do not
        exist, budgets that cannot be met, plan files of other models, nothing that becomes smaller.
    """
    calibration = recipe.calibration
    tokens = calibration.samples * calibration.window
    draft = Draft(source, architecture, recipe.seed, tokens, calibration.window, table=table)
    if slices is not None:
        draft.slices, draft.executed_slices = slices, True
    requested = {kind: recipe.stages_of(kind) for kind in kinds}
    for kind, compiler in kinds.items():
        if requested[kind]:
            compiler.announce(draft, requested[kind])
    for kind, compiler in kinds.items():
        if requested[kind]:
            compiler.compile(draft, requested[kind])
    tasks = {id(task): task for task in draft.tasks.values()}.values()
    first = {linear.name: n for n, linear in enumerate(draft.architecture.linears)}
    ordered = [with_statistics(t) for t in sorted(tasks, key=lambda t: first[t.name])]
    experts = describe_experts(draft.architecture, ordered)
    check_expected(experts, draft.tokens, draft.problems)
    smaller = any(task.compressed for task in ordered) or (draft.embeddings and draft.sized)
    if draft.no_saving_advice is not None and not draft.problems and not smaller:
        draft.problems.add(
            "nothing-smaller",
            "stages",
            f"every targeted matrix stays dense, so nothing would become smaller; "
            f"{draft.no_saving_advice}",
        )
    weights = PlannedWeights(draft.architecture, ordered, draft.embeddings, draft.allocations)
    if not draft.problems:
        check_served(draft.served, weights, draft.slices, draft.training, draft.problems)
    draft.problems.raise_if_any()
    whole, times = draft.whole, _times(draft)
    allocations = with_times(draft.allocations, times)
    warnings = [
        *draft.warnings,
        *(_unused(draft.architecture) if draft.tasks else []),
        *_few_tokens(ordered, draft.tokens),
    ]
    if weights.plain_integers and not draft.timed:
        allocations = [replace(each, one_scheme=True) for each in allocations]
        warnings += [] if draft.served else serving_warnings(weights)
    plan = Plan(
        model=ModelInfo(
            source=recipe.model.path,
            dtype=recipe.model.dtype,
            architecture=type(draft.architecture.model).__name__,
            parameters=whole.parameters,
            bytes=whole.bytes,
            source_file_bytes=source.file_bytes,
            source_quantized=source.gguf is not None,
            unchanged=_unchanged(draft.architecture),
            auto_class=draft.architecture.kind.auto_class.__name__,
        ),
        seed=recipe.seed,
        calibration=calibration.model_dump(mode="json"),
        tasks=ordered,
        embeddings=draft.embeddings,
        allocations=allocations,
        slices=draft.slices,
        training=draft.training,
        user_plans={
            stage: sha256(text.encode()).hexdigest() for stage, text in draft.user_plans.items()
        },
        warnings=warnings,
        elastic=draft.elastic,
        times=times,
        experts=experts,
    )
    return Compiled(plan, draft.architecture, draft.sliced, draft.user_plans, draft.all_products)


def _times(draft: Draft) -> ProductTimes | None:
    if draft.table is None or not draft.timed:
        return None
    table = draft.table.only(draft.all_products)
    return ProductTimes(tuple(draft.timed), table, tuple(task.name for task in draft.heads))


def _unchanged(architecture: Architecture) -> list[UnchangedPart]:
    return [
        UnchangedPart(name, type(part).__name__, sum(p.nbytes for p in part.parameters()))
        for name, part in architecture.other_parts().items()
    ]


def _unused(architecture: Architecture) -> list[str]:
    """Return a warning for every reason for which linear layers of decoder layers stay dense."""
    reasons: dict[str, list[str]] = {}
    for name, reason in architecture.unused.items():
        reasons.setdefault(reason, []).append(name)
    return [
        f"model: {len(names)} linear layers stay dense, because each {reason}: "
        + ", ".join(dict.fromkeys("*." + name.rpartition(".")[2] for name in names))
        for reason, names in reasons.items()
    ]


def _few_tokens(tasks: list[LayerTask], tokens: int) -> list[str]:
    """Return a warning for every input width with few calibration tokens."""
    widths = [task.shape[1] for task in tasks if solver_statistics(task) for _ in task.weights]
    narrow = Counter(width for width in widths if tokens < 4 * width)
    return [
        f"calibration: {tokens} tokens are few for {count} weights of input width {width}; "
        f"{4 * width} or more are advised"
        for width, count in sorted(narrow.items())
    ]
