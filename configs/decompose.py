"""Options that all decomposition methods share: the budget, its allocation and its targets."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.size import SIZE, SIZE_REMEDY, SIZE_WORDS
from lrc.configs.strict import Damp, Strict, Text

Keep = Annotated[float, Field(gt=0, le=1)]
Size = Annotated[
    str, Field(pattern=SIZE, json_schema_extra={"x-words": SIZE_WORDS, "x-remedy": SIZE_REMEDY})
]
Budgets = Annotated[list[Keep], Field(min_length=1)]
TIMED: dict[str, Any] = {"rows": 1, "latency_table": None}
"""Options that only `measure: latency` has -> their defaults."""
Allocation = Annotated[
    Literal["uniform", "heavy-tail", "lagrangian"],
    Field(
        description="How the budget is divided. `uniform`: the same fraction for every matrix; "
        "`heavy-tail`: by one threshold on the normalized singular values (WeLore); `lagrangian`: "
        "the least total loss that the method predicts."
    ),
]


class Override(Strict):
    """A separate budget for the matrices whose name matches."""

    match: Text
    """Shell pattern of full module names, such as `*.down_proj` or `model.layers.0.*`."""
    keep: Keep | None = None
    """Compressed bits over the bits of the matrix in the source model, or what `measure` says,
    (0, 1]."""
    rank: PositiveInt | None = None
    """Rank of the factors."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Override":
        if (self.keep is None) == (self.rank is None):
            given = "neither" if self.keep is None else "both"
            raise ValueError(f"give exactly one of 'keep' and 'rank', got {given}")
        return self


class Compensate(Strict):
    """Let every layer compensate for the error of the compressed layers before it."""

    mix: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Weight of the source model's outputs in the target of a layer, [0, 1]; the rest are the
    layer's own outputs on the inputs that the compressed model gives it."""
    residual: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction of the error in the residual stream that layers writing to it correct, [0, 1]."""
    damp: Damp = 1e-4


class DecomposeBase(Strict):
    """Options of every decomposition method."""

    method: str
    """How the components are found."""
    keep: Keep | None = None
    """Compressed bits over the bits of the targeted matrices in the source model, or what `measure`
    says, (0, 1]."""
    size: Size | None = None
    """Instead of `keep`: size of the weight files of the whole model, such as `180MiB`."""
    elastic: Budgets | None = None
    """Instead of `keep`: two or more budgets below 1, the largest first. The checkpoint stores the
    largest, and can be cut to any of the others without calibration. For low-rank methods."""
    drafter: Budgets | None = None
    """Instead of `keep`: budgets below 1, of which the one is used that is predicted to make the
    fastest pair of the source model and the result as its drafter. For `lagrangian` allocation."""
    measure: Literal["bits", "macs", "latency", "gguf"] = "bits"
    """What `keep` is a fraction of: stored bits, multiply-adds per token, the time of the products
    on the device that runs `lrc compress` or that `latency_table` was made on, or, for integers of
    `mixed`, the bits in a GGUF file."""
    allocation: Allocation = "uniform"
    rank_multiple: PositiveInt = 1
    """Ranks are multiples of this number; 8 to 128 suit tensor cores and group sizes."""
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Lowest fraction that any matrix keeps, [0, 1)."""
    max_relative_error: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Highest fraction of its weighted squared norm that any matrix loses, (0, 1]; `lagrangian`
    only."""
    plan: Text | None = None
    """A plan (JSON) of an earlier run, possibly edited; its ranks replace the allocation."""
    compensate: Compensate | None = None
    """Refit every layer on inputs from the compressed layers before it; `{}` for the defaults."""
    targets: list[str] = ["*"]
    """Shell patterns of module names; all linear layers of decoder layers by default."""
    ignore: list[str] = []
    """Shell patterns of linear layers to leave unchanged; they do not count in `keep`."""
    overrides: list[Override] = []
    """Budgets by name; the first that matches applies. The others share what these leave."""
    rows: PositiveInt = 1
    """With `measure: latency`: tokens per step of the products; 1 for generating one text."""
    latency_table: Text | None = None
    """With `measure: latency`: file of times that `lrc latency` has written, possibly on another
    machine; left out, times are measured at the start of `lrc compress`."""

    produces: ClassVar[str] = "low_rank"
    """Component type of methods that do not let the recipe choose one."""
    pattern_key: ClassVar[tuple[str, str]] = ("pattern", "use pattern: unstructured")
    """Option that decides about the pattern, and a remedy where no weight can have it."""
    why_not_elastic: ClassVar[str | None] = "its components have no order in which they can be cut"
    """Why the result of the method has no smaller budgets; None if it has."""

    @property
    def largest_keep(self) -> float | None:
        """The budget as a fraction, of several the largest; None if it is a size or in a plan."""
        several = self.elastic or self.drafter
        return self.keep if several is None else max(several)

    @property
    def component_types(self) -> tuple[str, ...]:
        """Sums of component types that the method may produce, joined by ``+``."""
        return (getattr(self, "storage", self.produces),)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Atoms per coefficient of dictionaries, ascending."""
        ratio: float | list[float] = getattr(self, "ratio", 2.0)
        return tuple(sorted(set(ratio))) if isinstance(ratio, list) else (ratio,)

    @property
    def zero_pattern(self) -> str | None:
        """Pattern of stored entries; None if unstructured."""
        pattern: str = getattr(self, "pattern", "unstructured")
        return None if pattern == "unstructured" else pattern

    @property
    def group_layers(self) -> int:
        """Number of consecutive layers that share a factor."""
        return int(getattr(self, "layers_per_group", 1))

    @property
    def group_experts(self) -> int:
        """Number of experts of a layer that share a factor."""
        return int(getattr(self, "experts_per_group", 1))

    @property
    def scheme_choices(self) -> tuple[str, ...]:
        """Integer formats that the allocator may choose."""
        return tuple(getattr(self, "schemes", ()))

    @property
    def solver_options(self) -> dict[str, Any]:
        """Options that only some methods have: the arguments of their solvers."""
        return self.model_dump(exclude=set(DecomposeBase.model_fields))

    @model_validator(mode="after")
    def _one_budget(self) -> "DecomposeBase":
        names = ("keep", "size", "elastic", "drafter")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1 or not (given or self.plan):
            text = (
                "give exactly one of 'keep', 'size', 'elastic' and 'drafter', or a 'plan' with the "
                "ranks"
            )
            raise ValueError(f"{text}; got {' and '.join(given) or 'none of them'}")
        if self.size is not None and self.measure != "bits":
            raise ValueError(
                f"'size' counts bytes and cannot be measured in '{self.measure}'; give 'keep' "
                "instead"
            )
        idle = [key for key, default in TIMED.items() if getattr(self, key) != default]
        if idle and self.measure != "latency":
            raise ValueError(
                f"'{idle[0]}' has no effect with measure: {self.measure}; remove it, or choose "
                "measure: latency"
            )
        if self.measure == "gguf" and self.method != "mixed":
            raise ValueError(
                "'measure' can only be gguf with method: mixed, of whose integers GGUF has blocks, "
                f"got method: {self.method}; choose measure: bits"
            )
        if self.keep is not None and self.min_keep > self.keep:
            raise ValueError(
                f"'min_keep' must be at most 'keep', {self.keep:g}, got {self.min_keep:g}; "
                "lower min_keep or raise keep"
            )
        return self

    @model_validator(mode="after")
    def _elastic_budgets(self) -> "DecomposeBase":
        if self.elastic is None:
            return self
        listed, ordered = (
            f"[{', '.join(f'{each:g}' for each in budgets)}]"
            for budgets in (self.elastic, sorted({*self.elastic}, reverse=True))
        )
        if len(self.elastic) < 2:
            raise ValueError(
                f"'elastic' must list two or more budgets, got {listed}; add a smaller one, or "
                "give it as 'keep'"
            )
        if listed != ordered:
            raise ValueError(
                "'elastic' must list different budgets from the largest to the smallest, got "
                f"{listed}; write {ordered}"
            )
        if self.elastic[0] == 1:
            raise ValueError(
                "'elastic' must list budgets below 1, at which the weights stay dense and cannot "
                f"be cut, got {listed}; lower the first one"
            )
        if self.min_keep > self.elastic[-1]:
            raise ValueError(
                "'min_keep' must be at most the smallest of 'elastic', "
                f"{self.elastic[-1]:g}, got {self.min_keep:g}; lower min_keep"
            )
        return self

    @model_validator(mode="after")
    def _drafter_budgets(self) -> "DecomposeBase":
        if self.drafter is None:
            return self
        listed = f"[{', '.join(f'{each:g}' for each in self.drafter)}]"
        if max(self.drafter) == 1 or len({*self.drafter}) < len(self.drafter):
            raise ValueError(
                f"'drafter' must list different budgets below 1, got {listed}; change or remove "
                "those that are not"
            )
        if self.min_keep > min(self.drafter):
            raise ValueError(
                f"'min_keep' must be at most the smallest of 'drafter', {min(self.drafter):g}, got "
                f"{self.min_keep:g}; lower min_keep"
            )
        if self.measure == "macs":
            raise ValueError(
                "'drafter' compares times, which multiply-adds do not give; set measure: latency, "
                "or measure: bits for times in proportion to bytes"
            )
        if self.allocation != "lagrangian":
            raise ValueError(
                f"'drafter' needs predicted losses, got allocation: {self.allocation}; set "
                "allocation: lagrangian"
            )
        return self

    @model_validator(mode="after")
    def _elastic_combinations(self) -> "DecomposeBase":
        if self.elastic is None:
            return self
        if self.why_not_elastic is not None:
            raise ValueError(
                f"'elastic' cannot be combined with method: {self.method}, because "
                f"{self.why_not_elastic}; choose svd-llm or kfac, or give 'keep' instead"
            )
        for key, value, allowed in (
            ("measure", self.measure, ("bits",)),
            ("allocation", self.allocation, ("uniform", "lagrangian")),
            ("plan", self.plan, (None,)),
        ):
            if value not in allowed:
                remedy = " or ".join(filter(None, allowed))
                raise ValueError(
                    f"'elastic' cannot be combined with {key}: {value}; "
                    + (f"set {key}: {remedy}" if remedy else f"remove '{key}'")
                )
        if self.compensate is not None and self.component_types == ("pivoted_low_rank",):
            raise ValueError(
                "'elastic' cannot be combined with 'compensate' and storage: pivoted_low_rank, "
                "because pivot rows that are fitted to the inputs of the smallest budget make all "
                "larger budgets worse; remove 'compensate' and add a 'heal' stage, or set storage: "
                "low_rank"
            )
        return self
