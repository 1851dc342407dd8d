"""What may be asked of every decomposition: a budget, what it is for, and how it is spread."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.size import SIZE, SIZE_REMEDY, SIZE_WORDS
from lrc.configs.strict import Strict, Text

Keep = Annotated[float, Field(gt=0, le=1)]
Size = Annotated[
    str, Field(pattern=SIZE, json_schema_extra={"x-words": SIZE_WORDS, "x-remedy": SIZE_REMEDY})
]
Damp = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Fraction of the mean diagonal of the input second moment that is added to it.",
    ),
]
Allocation = Annotated[
    Literal["uniform", "heavy-tail", "lagrangian"],
    Field(
        description="How the budget is spread: the same share for every matrix (`uniform`), by one "
        "threshold on the normalised singular values (`heavy-tail`, WeLore), or where the method "
        "predicts the least loss (`lagrangian`)."
    ),
]


class Override(Strict):
    """Another budget for the matrices whose name matches."""

    match: Text
    """Shell pattern over full module names, e.g. `*.down_proj` or `model.layers.0.*`."""
    keep: Keep | None = None
    """Stored bits over the bits of the matrix in the source, (0, 1]."""
    rank: PositiveInt | None = None
    """Inner size of the factors."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Override":
        if (self.keep is None) == (self.rank is None):
            given = "neither" if self.keep is None else "both"
            raise ValueError(f"give exactly one of 'keep' and 'rank', got {given}")
        return self


class Compensate(Strict):
    """Let every layer make up for what the compressed layers before it lost."""

    mix: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the dense model's outputs in what the layer aims at; the rest are its own outputs
    on the inputs it will really see."""
    residual: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of what the residual stream lacks that layers writing to it try to make up for."""
    damp: Damp = 1e-4


class DecomposeBase(Strict):
    """What every decomposition method understands."""

    method: str
    """How the factors are found."""
    keep: Keep | None = None
    """Stored bits over the bits of the matrices in the source, (0, 1]."""
    size: Size | None = None
    """Instead of `keep`: size of the whole model's weight files, such as `180MiB`."""
    measure: Literal["bits", "macs"] = "bits"
    """What `keep` is a share of: stored bits, or multiply-adds a token."""
    allocation: Allocation = "uniform"
    rank_multiple: PositiveInt = 1
    """Ranks are multiples of it: 8 to 128 suit tensor cores and group sizes."""
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """No matrix keeps a smaller share than this."""
    max_loss: Annotated[float, Field(gt=0, le=1)] = 1.0
    """No matrix loses a larger share of its weighted energy; `lagrangian` only."""
    plan: Text | None = None
    """A plan (JSON) that an earlier run wrote, edited at will: its ranks replace the allocation."""
    compensate: Compensate | None = None
    """Refit every layer on the inputs that the compressed layers before it produce."""
    targets: list[str] = ["*"]
    """Shell patterns over module names; every linear of a decoder layer that matches one."""
    ignore: list[str] = []
    """Shell patterns of linear layers to leave unchanged; they do not count in `keep`."""
    overrides: list[Override] = []
    """Budgets by name; the first that matches wins."""

    @property
    def component_types(self) -> tuple[str, ...]:
        """Sums of component types that the method may produce, joined by ``+``."""
        raise NotImplementedError

    @property
    def ratios(self) -> tuple[float, ...]:
        """Atoms per coefficient of dictionaries, ascending."""
        return (2.0,)

    @property
    def zero_pattern(self) -> str | None:
        """Pattern of stored entries; None if unstructured."""
        return None

    @property
    def group_layers(self) -> int:
        """Number of consecutive layers that share a factor."""
        return 1

    @property
    def scheme_choices(self) -> tuple[str, ...]:
        """Integer formats that the allocator may choose."""
        return ()

    @property
    def solver_options(self) -> dict[str, Any]:
        """Options that only some methods have: the arguments of their solvers."""
        return self.model_dump(exclude=set(DecomposeBase.model_fields))

    @model_validator(mode="after")
    def _one_budget(self) -> "DecomposeBase":
        given = [name for name in ("keep", "size") if getattr(self, name) is not None]
        if len(given) == 2 or not (given or self.plan):
            text = "give exactly one of 'keep' and 'size', or a 'plan' that has the ranks"
            raise ValueError(f"{text}; got {' and '.join(given) or 'none of them'}")
        if self.size is not None and self.measure != "bits":
            raise ValueError(
                "'size' counts bytes and cannot be measured in 'macs'; give 'keep' instead"
            )
        if self.keep is not None and self.min_keep > self.keep:
            raise ValueError(
                f"'min_keep' must be at most 'keep', {self.keep:g}, got {self.min_keep:g}; "
                "lower min_keep or raise keep"
            )
        return self
