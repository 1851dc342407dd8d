"""What may be asked of a method of decomposition: a model of options for every one."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.decompose import Allocation, Damp, DecomposeBase
from lrc.configs.quantize import Embeddings, Gauge, Head, Rounder, Written

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
    forms: Annotated[
        list[Literal["low-rank", "sparse", "sum", "dictionary", "dense"]], Field(min_length=1)
    ] = ["low-rank", "sparse"]
    """What a matrix may become, `dense` in any case; a `sum` is low rank with entries beside it."""
    schemes: list[Written] = []
    """Integers, such as `int8` or `int4-g64`, that the numbers of any form, dense too, may be
    rounded to."""
    embeddings: Embeddings = None
    head: Head = None
    rounder: Rounder = "gptq"
    order: bool = True
    """With `gptq`: round the columns of the largest inputs first."""
    gauge: Gauge = "measured"
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    ratio: Ratio = 3.0
    rounds: PositiveInt = 15
    """Updates of coefficients and atoms of a dictionary."""
    allocation: Literal["lagrangian"] = "lagrangian"
    """The least predicted loss; there is no other way to choose between forms."""
    storage: Storage = "pivot"

    @model_validator(mode="after")
    def _schemes_are_of_use(self) -> "Mixed":
        twice = sorted({each for each in self.schemes if self.schemes.count(each) > 1})
        if twice:
            raise ValueError(f"the 'schemes' must differ, got twice: {twice}; remove one")
        if self.schemes and self.measure != "bits":
            raise ValueError(
                f"'schemes' save bits and no multiply-adds, got measure: {self.measure}; take "
                "measure: bits, or leave 'schemes' out"
            )
        if not self.schemes and set(self.forms) == {"dense"} and self.plan is None:
            raise ValueError(
                "forms: [dense] needs 'schemes' to make anything smaller, got none; give some, "
                "such as [int8, int4-g64], or name other forms"
            )
        return self


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
