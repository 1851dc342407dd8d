"""What may be asked of a decomposition: a model of options for every method."""

from typing import Annotated, Literal

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
PruningAllocation = Annotated[
    Literal["uniform", "lagrangian"],
    Field(
        description="How the budget is spread: the same share for every matrix (`uniform`), or "
        "where the method predicts the least loss (`lagrangian`)."
    ),
]
Storage = Annotated[
    Literal["factors", "pivot"],
    Field(
        description="Two factors, or some rows of their product and how the others follow (`pivot`,"
        " PIFA): lossless, and more rank for the same bits."
    ),
]
Pattern = Literal["unstructured", "2:4"]
GradientDamp = Annotated[
    float,
    Field(
        ge=0,
        lt=10,
        description="Fraction of the mean diagonal of the gradient second moment that is added to "
        "it: the fewer calibration tokens, the more is needed.",
    ),
]


OneRatio = Annotated[float, Field(ge=1)]
Ratio = Annotated[
    OneRatio | Annotated[list[OneRatio], Field(min_length=1)],
    Field(
        description="Atoms of a dictionary over the coefficients of one output; of a list, "
        "`lagrangian` chooses for every matrix."
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
    storage: str
    """How what is found is written to the file."""
    compensate: Compensate | None = None
    """Refit every layer on the inputs that the compressed layers before it produce."""
    targets: list[str] = ["*"]
    """Shell patterns over module names; every linear of a decoder layer that matches one."""
    skip: list[str] = []
    """Shell patterns of linears to leave as they are; they do not count in `keep`."""
    overrides: list[Override] = []
    """Budgets by name; the first that matches wins."""

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


class LowRank(DecomposeBase):
    """What every method understands that makes products of thinner matrices."""

    storage: Storage = "factors"


class Coded(DecomposeBase):
    """What every method understands that has no ranks."""

    allocation: PruningAllocation = "uniform"
    rank_multiple: Literal[1] = 1
    """There are no ranks here."""


class Svd(LowRank):
    """Plain truncated SVD: the closest matrix of that rank, blind to the data."""

    method: Literal["svd"]
    """Plain truncated SVD."""


class Fwsvd(LowRank):
    """FWSVD: rows weighted by their Fisher information; the paper takes `labels: real`."""

    method: Literal["fwsvd"]
    """Rows weighted by their Fisher information."""


class Asvd(LowRank):
    """ASVD: columns scaled by the mean magnitude of their inputs."""

    method: Literal["asvd"]
    """Columns scaled by the magnitude of their inputs."""
    alpha: Annotated[float, Field(ge=0, le=2)] = 0.5
    """Power of the mean magnitude."""


class SvdLlm(LowRank):
    """Whitened truncated SVD (SVD-LLM): the smallest output error on the calibration tokens."""

    method: Literal["svd-llm"]
    """Whitened truncated SVD."""
    damp: Damp = 1e-6


class Lord(LowRank):
    """LoRD: principal components of the outputs about their mean, which a bias restores."""

    method: Literal["lord"]
    """Principal components of the outputs, with a bias."""
    damp: Damp = 1e-6


class Kfac(LowRank):
    """Two-sided: the least predicted loss, by second moments of inputs and output gradients."""

    method: Literal["kfac"]
    """Least predicted loss, from inputs and output gradients."""
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    allocation: Allocation = "lagrangian"
    storage: Storage = "pivot"


class BasisSharing(LowRank):
    """Basis Sharing: one right factor for the same matrix of several layers in a row."""

    method: Literal["basis-sharing"]
    """One right factor for several layers."""
    damp: Damp = 1e-6
    group_size: Annotated[int, Field(ge=2)] = 2
    """Layers that share."""
    storage: Literal["factors"] = "factors"
    """Two factors, of which the shared one is stored once: pivot rows cannot be shared."""
    compensate: None = None
    """Not with this method: its layers are solved together."""


class Pruning(Coded):
    """What every method understands that keeps some entries of a matrix."""

    storage: Literal["mask"] = "mask"
    """The entries that are kept, and one bit for every entry of the matrix."""
    pattern: Pattern = "unstructured"
    """Which entries may be kept: any, or two of every four consecutive inputs (`2:4`), 0.5625 of
    16-bit bits and no other size."""


class Magnitude(Pruning):
    """Magnitude pruning: the largest entries, blind to the data."""

    method: Literal["magnitude"]
    """The largest entries."""


class Wanda(Pruning):
    """Wanda: entries by magnitude times the norm of their input, compared within each output."""

    method: Literal["wanda"]
    """Entries by magnitude times the norm of their input."""
    damp: Damp = 1e-6


class Sparse(Pruning):
    """Second-order pruning: the entries, and their values, of the least predicted loss."""

    method: Literal["sparse"]
    """Entries of the least predicted loss, refitted."""
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    allocation: PruningAllocation = "lagrangian"


class Learning(Coded):
    """What every method understands that learns a dictionary: atoms, and few for every output."""

    storage: Literal["dictionary"] = "dictionary"
    """The atoms, the coefficients, and which atoms they are of."""
    ratio: Ratio = 2.0
    damp: Damp = 1e-6

    @model_validator(mode="after")
    def _one_ratio(self) -> "Learning":
        if isinstance(self.ratio, list) and self.allocation != "lagrangian" and self.plan is None:
            raise ValueError(
                f"'ratio' must be one number with allocation: {self.allocation}, got a list; "
                "write the one, or take allocation: lagrangian, which chooses for every matrix"
            )
        return self


class Cospadi(Learning):
    """CoSpaDi: K-SVD with orthogonal matching pursuit behind whitening; slow."""

    method: Literal["cospadi"]
    """K-SVD with orthogonal matching pursuit."""
    rounds: PositiveInt = 60
    """Updates of coefficients and atoms."""
    group_size: PositiveInt = 1
    """Layers in a row whose same matrix shares one dictionary; every layer has coefficients of its
    own."""

    @model_validator(mode="after")
    def _alone_if_refitted(self) -> "Cospadi":
        if self.group_size > 1 and self.compensate is not None:
            raise ValueError(
                f"'compensate' needs group_size: 1, got {self.group_size}, because layers that "
                "share are solved together; leave compensate out or set group_size: 1"
            )
        return self


class TwoSidedLearning(Learning):
    """Outputs are weighted by their gradients, and losses predicted by both sides."""

    gradient_damp: GradientDamp = 0.1
    allocation: PruningAllocation = "lagrangian"


class Compot(TwoSidedLearning):
    """COMPOT: an orthogonal dictionary by thresholding and Procrustes rotations."""

    method: Literal["compot"]
    """An orthogonal dictionary."""
    rounds: PositiveInt = 20
    """Updates of coefficients and atoms."""
    pattern: Pattern = "unstructured"
    """Which atoms an output may use: any, or two of every four consecutive ones (`2:4`)."""


class Rocket(TwoSidedLearning):
    """ROCKET: the eigenbasis, thresholded once, and the atoms refitted."""

    method: Literal["rocket"]
    """The eigenbasis, thresholded once."""


class Dictionary(TwoSidedLearning):
    """Hard-thresholding pursuit with refitted atoms, from the singular vectors."""

    method: Literal["dictionary"]
    """Hard-thresholding pursuit with refitted atoms."""
    ratio: Ratio = 3.0
    rounds: PositiveInt = 15
    """Updates of coefficients and atoms."""
    pattern: Pattern = "unstructured"
    """Which atoms an output may use: any, or two of every four consecutive ones (`2:4`)."""


class Mixed(DecomposeBase):
    """Every matrix in the form that loses least at its share of one budget."""

    method: Literal["mixed"]
    """The best form for every matrix."""
    forms: Annotated[list[Literal["low-rank", "sparse", "dictionary"]], Field(min_length=1)] = [
        "low-rank",
        "sparse",
    ]
    """What a matrix may become, beside dense."""
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    ratio: Ratio = 3.0
    rounds: PositiveInt = 15
    """Updates of coefficients and atoms of a dictionary."""
    allocation: Literal["lagrangian"] = "lagrangian"
    """The least predicted loss; there is no other way to choose between forms."""
    storage: Storage = "pivot"


Decompose = Annotated[
    Svd
    | Fwsvd
    | Asvd
    | SvdLlm
    | Lord
    | Kfac
    | BasisSharing
    | Magnitude
    | Wanda
    | Sparse
    | Cospadi
    | Compot
    | Rocket
    | Dictionary
    | Mixed,
    Field(discriminator="method"),
]
