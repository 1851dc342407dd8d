"""What may be asked of a method of decomposition: a model of options for every one."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.decompose import Allocation, Damp, DecomposeBase
from lrc.configs.quantize import Balance, Embeddings, LmHead, Quantizer, SchemeName

PruningAllocation = Annotated[
    Literal["uniform", "lagrangian"],
    Field(
        description="How the budget is spread: the same share for every matrix (`uniform`), or "
        "where the method predicts the least loss (`lagrangian`)."
    ),
]
Storage = Annotated[
    Literal["low_rank", "pivoted_low_rank"],
    Field(
        description="How the product of rank r is stored: as two factors (`low_rank`), or as r of "
        "its rows and the coefficients that give the other rows (`pivoted_low_rank`, PIFA). Both "
        "give the same weight; the second allows a higher rank in the same bits."
    ),
]
Component = Literal[
    "low_rank", "pivoted_low_rank", "sparse", "pivoted_low_rank+sparse", "dictionary", "dense"
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


def _ascending(ratio: float | list[float]) -> tuple[float, ...]:
    return tuple(sorted(set(ratio))) if isinstance(ratio, list) else (ratio,)


class LowRank(DecomposeBase):
    """What every method understands that makes products of thinner matrices."""

    storage: Storage = "low_rank"

    @property
    def component_types(self) -> tuple[str, ...]:
        """Return the storage of the product."""
        return (self.storage,)


class FixedSize(DecomposeBase):
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
    storage: Storage = "pivoted_low_rank"


class BasisSharing(DecomposeBase):
    """Basis Sharing: one right factor for the same matrix of several layers in a row."""

    method: Literal["basis-sharing"]
    """One right factor for several layers."""
    damp: Damp = 1e-6
    layers_per_group: Annotated[int, Field(ge=2)] = 2
    """Number of consecutive layers that share a factor."""
    compensate: None = None
    """Not with this method: its layers are solved together."""

    @property
    def component_types(self) -> tuple[str, ...]:
        """Return two factors: pivot rows cannot be shared."""
        return ("low_rank",)

    @property
    def group_layers(self) -> int:
        """Return `layers_per_group`."""
        return self.layers_per_group


class Pruning(FixedSize):
    """What every method understands that keeps some entries of a matrix."""

    pattern: Pattern = "unstructured"
    """Which entries may be kept: any, or two of every four consecutive inputs (`2:4`), 0.5625 of
    16-bit bits and no other size."""

    @property
    def component_types(self) -> tuple[str, ...]:
        """Return ``sparse``."""
        return ("sparse",)

    @property
    def zero_pattern(self) -> str | None:
        """Return the pattern."""
        return None if self.pattern == "unstructured" else self.pattern


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


class Learning(FixedSize):
    """What every method understands that learns a dictionary: atoms, and few for every output."""

    ratio: Ratio = 2.0
    damp: Damp = 1e-6

    @property
    def component_types(self) -> tuple[str, ...]:
        """Return ``dictionary``."""
        return ("dictionary",)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Return the ratios, ascending."""
        return _ascending(self.ratio)

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
    layers_per_group: PositiveInt = 1
    """Number of consecutive layers whose matrices of the same name share one dictionary; each layer
    has separate coefficients."""

    @property
    def group_layers(self) -> int:
        """Return `layers_per_group`."""
        return self.layers_per_group

    @model_validator(mode="after")
    def _alone_if_refitted(self) -> "Cospadi":
        if self.layers_per_group > 1 and self.compensate is not None:
            raise ValueError(
                f"'compensate' needs layers_per_group: 1, got {self.layers_per_group}, because "
                "layers that share a dictionary are solved together; remove compensate or set "
                "layers_per_group: 1"
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

    @property
    def zero_pattern(self) -> str | None:
        """Return the pattern."""
        return None if self.pattern == "unstructured" else self.pattern


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

    @property
    def zero_pattern(self) -> str | None:
        """Return the pattern."""
        return None if self.pattern == "unstructured" else self.pattern


class Mixed(DecomposeBase):
    """Several component types: each matrix gets the one with the least loss under one budget."""

    method: Literal["mixed"]
    """The best component type for each matrix."""
    components: Annotated[list[Component], Field(min_length=1)] = ["pivoted_low_rank", "sparse"]
    """Component types that a matrix may be compressed to; leaving it `dense` is always allowed.
    `pivoted_low_rank+sparse` is the sum of both."""
    schemes: list[SchemeName] = []
    """Integer formats, such as `int8` or `int4-g64`, to which any matrix, dense ones included, may
    be quantized."""
    embeddings: Embeddings = None
    lm_head: LmHead = None
    quantizer: Quantizer = "gptq"
    act_order: bool = True
    """With `gptq`: quantize the columns with the largest inputs first."""
    balance: Balance = "measured"
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    ratio: Ratio = 3.0
    rounds: PositiveInt = 15
    """Updates of coefficients and atoms of a dictionary."""
    allocation: Literal["lagrangian"] = "lagrangian"
    """The least predicted loss, the only way to choose between component types."""

    @property
    def component_types(self) -> tuple[str, ...]:
        """Return the components without ``dense``, which is always allowed."""
        return tuple(each for each in self.components if each != "dense")

    @property
    def ratios(self) -> tuple[float, ...]:
        """Return the ratios, ascending."""
        return _ascending(self.ratio)

    @property
    def scheme_choices(self) -> tuple[str, ...]:
        """Return the schemes."""
        return tuple(self.schemes)

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
        if not self.schemes and set(self.components) == {"dense"} and self.plan is None:
            raise ValueError(
                "components: [dense] needs 'schemes' to make anything smaller, got none; give "
                "some, such as [int8, int4-g64], or name other components"
            )
        return self

    @model_validator(mode="after")
    def _one_storage_of_products(self) -> "Mixed":
        if {"low_rank", "pivoted_low_rank"} <= set(self.components):
            raise ValueError(
                "'components' may name low_rank or pivoted_low_rank, got both; keep "
                "pivoted_low_rank, which stores the same product in fewer bits"
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
