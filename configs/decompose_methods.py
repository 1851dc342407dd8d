"""Options of each decomposition method, one model per method."""

from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.decompose import Allocation, DecomposeBase
from lrc.configs.engines import Serve, engine_problem
from lrc.configs.quantize import ActOrder, Balance, Embeddings, LmHead, Quantizer, SchemeName
from lrc.configs.strict import Damp, repeated

FixedSizeAllocation = Annotated[
    Literal["uniform", "lagrangian"],
    Field(
        description="How the budget is divided. `uniform`: the same fraction for every matrix; "
        "`lagrangian`: the least total loss that the method predicts."
    ),
]
Storage = Annotated[
    Literal["low_rank", "pivoted_low_rank"],
    Field(
        description="How a product of rank r is stored: as two factors (`low_rank`), or as r of "
        "its rows and the coefficients that give the other rows (`pivoted_low_rank`, PIFA). Both "
        "give the same weight; the second allows a higher rank in the same bits."
    ),
]
Component = Literal[
    "low_rank",
    "pivoted_low_rank",
    "sparse",
    "semi_structured",
    "pivoted_low_rank+sparse",
    "dictionary",
    "dense",
]
EntryPattern = Annotated[
    Literal["unstructured", "2:4", "n:8"],
    Field(
        description="Which entries may be kept: any (`unstructured`); two of every four "
        "consecutive inputs (`2:4`), which always takes 0.5625 of the bits of 16-bit weights; or "
        "equally many of every eight (`n:8`), with one n for every matrix."
    ),
]
AtomPattern = Annotated[
    Literal["unstructured", "2:4"],
    Field(
        description="Which atoms an output may use: any (`unstructured`), or two of every four "
        "consecutive ones (`2:4`)."
    ),
]
GradientDamp = Annotated[
    float,
    Field(
        ge=0,
        lt=10,
        description="Fraction of the mean diagonal of the gradient second moment that is added to "
        "its diagonal; fewer calibration tokens need more.",
    ),
]
OneRatio = Annotated[float, Field(ge=1)]
Ratio = Annotated[
    OneRatio | Annotated[list[OneRatio], Field(min_length=1)],
    Field(
        description="Number of atoms of a dictionary over the number of coefficients of one "
        "output, at least 1; from a list, `lagrangian` chooses one for every matrix."
    ),
]
Rounds = Annotated[PositiveInt, Field(description="Alternating updates of coefficients and atoms.")]


class LowRank(DecomposeBase):
    """Options of the methods that give one product of two factors for each matrix."""

    storage: Storage = "low_rank"

    why_not_elastic: ClassVar[str | None] = None


class FixedSize(DecomposeBase):
    """Options of the methods without ranks."""

    allocation: FixedSizeAllocation = "uniform"
    rank_multiple: Literal[1] = 1
    """This method has no ranks."""


class Svd(LowRank):
    """Plain truncated SVD: the closest matrix of its rank; uses no calibration text."""

    method: Literal["svd"]


class Fwsvd(LowRank):
    """FWSVD: rows weighted by their Fisher information; the paper uses `labels: real`."""

    method: Literal["fwsvd"]


class Asvd(LowRank):
    """ASVD: columns scaled by the mean magnitude of their inputs."""

    method: Literal["asvd"]
    alpha: Annotated[float, Field(ge=0, le=2)] = 0.5
    """Exponent of the mean magnitude, [0, 2]."""


class SvdLlm(LowRank):
    """SVD-LLM: whitened truncated SVD, the least output error on the calibration text."""

    method: Literal["svd-llm"]
    damp: Damp = 1e-6


class Lord(LowRank):
    """LoRD: principal components of the outputs around their mean, which a bias restores."""

    method: Literal["lord"]
    damp: Damp = 1e-6

    why_not_elastic = "its biases restore the mean output at one rank only"


class Kfac(LowRank):
    """The least predicted loss, from second moments of inputs and of output gradients."""

    method: Literal["kfac"]
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    allocation: Allocation = "lagrangian"
    storage: Storage = "pivoted_low_rank"


class BasisSharing(DecomposeBase):
    """Basis Sharing: the same matrix of consecutive layers shares its right factor."""

    method: Literal["basis-sharing"]
    damp: Damp = 1e-6
    layers_per_group: Annotated[int, Field(ge=2)] = 2
    """Number of consecutive layers that share a factor."""
    experts_per_group: PositiveInt = 1
    """Number of experts of a layer that share a factor. 1: experts of the same number in
    consecutive layers share one, like other matrices."""
    compensate: None = None
    """Not available with this method, which solves several layers together."""

    why_not_elastic = "several layers share a factor"


class Pruning(FixedSize):
    """Options of the methods that keep some entries of a matrix."""

    pattern: EntryPattern = "unstructured"

    @property
    def component_types(self) -> tuple[str, ...]:
        """Return the component that stores the pattern."""
        return ("semi_structured" if self.pattern == "n:8" else "sparse",)

    @property
    def zero_pattern(self) -> str | None:
        """Return the pattern that the component has besides its sizes."""
        return "2:4" if self.pattern == "2:4" else None


class Magnitude(Pruning):
    """Magnitude pruning: the largest entries; uses no calibration text."""

    method: Literal["magnitude"]


class Wanda(Pruning):
    """Wanda: entries by magnitude times the norm of their input, compared within each output."""

    method: Literal["wanda"]
    damp: Damp = 1e-6


class Sparse(Pruning):
    """Second-order pruning: the entries of the least predicted loss, refitted."""

    method: Literal["sparse"]
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    allocation: FixedSizeAllocation = "lagrangian"


class Learning(FixedSize):
    """Options of the methods that learn a dictionary: each output combines a few of its atoms."""

    produces = "dictionary"

    ratio: Ratio = 2.0
    damp: Damp = 1e-6

    @model_validator(mode="after")
    def _one_ratio(self) -> "Learning":
        if isinstance(self.ratio, list) and self.allocation != "lagrangian" and self.plan is None:
            raise ValueError(
                f"'ratio' must be one number with allocation: {self.allocation}, got a list; "
                "give one number, or allocation: lagrangian, which chooses for every matrix"
            )
        return self


class Cospadi(Learning):
    """CoSpaDi: K-SVD with orthogonal matching pursuit after whitening; slow."""

    method: Literal["cospadi"]
    rounds: Rounds = 60
    layers_per_group: PositiveInt = 1
    """Number of consecutive layers whose matrices of the same name share one dictionary; each layer
    has separate coefficients."""

    @model_validator(mode="after")
    def _compensate_single_layers(self) -> "Cospadi":
        if self.layers_per_group > 1 and self.compensate is not None:
            raise ValueError(
                f"'compensate' needs layers_per_group: 1, got {self.layers_per_group}, because "
                "layers that share a dictionary are solved together; remove compensate or set "
                "layers_per_group: 1"
            )
        return self


class TwoSidedLearning(Learning):
    """Options of the methods that also weight outputs by their gradients."""

    gradient_damp: GradientDamp = 0.1
    allocation: FixedSizeAllocation = "lagrangian"


class Compot(TwoSidedLearning):
    """COMPOT: an orthogonal dictionary by thresholding and Procrustes rotations."""

    method: Literal["compot"]
    rounds: Rounds = 20
    pattern: AtomPattern = "unstructured"


class Rocket(TwoSidedLearning):
    """ROCKET: eigenvectors as atoms, thresholded once, then the atoms refitted."""

    method: Literal["rocket"]


class Dictionary(TwoSidedLearning):
    """Hard-thresholding pursuit with refitted atoms, starting from the singular vectors."""

    method: Literal["dictionary"]
    ratio: Ratio = 3.0
    rounds: Rounds = 15
    pattern: AtomPattern = "unstructured"


class TensorTrain(FixedSize):
    """A chain of cores (CompactifAI) with the least predicted loss; experimental."""

    method: Literal["tensor-train"]
    cores: Annotated[int, Field(ge=2, le=4)] = 2
    """Number of cores, [2, 4]."""
    factors: list[Annotated[list[PositiveInt], Field(min_length=2, max_length=4)]] = []
    """How to factor dimensions: lists of as many factors as there are cores, such as
    `[[24, 24], [32, 48]]` for the dimensions 576 and 1536. Others are factored automatically, into
    factors of similar size."""
    rounds: Annotated[PositiveInt, Field(description="Alternating updates of all cores.")] = 4
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    allocation: FixedSizeAllocation = "lagrangian"

    produces = "tensor_train"
    pattern_key = ("cores", "lower cores")

    @model_validator(mode="after")
    def _one_factor_per_core(self) -> "TensorTrain":
        dimensions = [prod(each) for each in self.factors]
        for number, each in enumerate(self.factors):
            if len(each) != self.cores:
                raise ValueError(
                    f"'factors' must list {self.cores} factors for every dimension, one per core, "
                    f"got {each}; change it, or set cores: {len(each)}"
                )
            if dimensions[number] in dimensions[:number]:
                raise ValueError(
                    f"'factors' must list every dimension once, got {dimensions[number]} twice; "
                    f"remove {each}"
                )
        return self


class Mixed(DecomposeBase):
    """Several component types: each matrix gets the one with the least loss under one budget."""

    method: Literal["mixed"]
    components: Annotated[list[Component], Field(min_length=1)] = ["pivoted_low_rank", "sparse"]
    """Component types to choose from; leaving a matrix `dense` is always possible.
    `pivoted_low_rank+sparse` is the sum of both; `semi_structured` is sparse with pattern n:8."""
    schemes: list[SchemeName] = []
    """Integer formats, such as `int8` or `int4-g64`, to which any matrix, dense ones included, may
    be quantized."""
    embeddings: Embeddings = None
    lm_head: LmHead = None
    serve: Serve = None
    quantizer: Quantizer = "gptq"
    act_order: ActOrder = True
    balance: Balance = "measured"
    damp: Damp = 1e-6
    gradient_damp: GradientDamp = 0.1
    ratio: Ratio = 3.0
    rounds: Rounds = 15
    allocation: Literal["lagrangian"] = "lagrangian"
    """The least predicted loss, the only way to choose between component types."""

    @property
    def component_types(self) -> tuple[str, ...]:
        """Return the components without ``dense``, which is always allowed."""
        return tuple(each for each in self.components if each != "dense")

    @model_validator(mode="after")
    def _components_and_schemes(self) -> "Mixed":
        if twice := repeated(self.schemes):
            raise ValueError(f"the 'schemes' must differ, got twice: {twice}; remove one")
        if self.schemes and self.measure == "macs":
            raise ValueError(
                "'schemes' save bits and no multiply-adds, got measure: macs; choose measure: bits "
                "or latency, or remove 'schemes'"
            )
        if self.measure == "gguf" and set(self.components) != {"dense"}:
            raise ValueError(
                "measure: gguf counts matrices of integers only, got components: "
                f"[{', '.join(self.components)}]; write components: [dense], or choose measure: "
                "bits"
            )
        if not self.schemes and set(self.components) == {"dense"} and self.plan is None:
            raise ValueError(
                "components: [dense] needs 'schemes' to make anything smaller, got none; add some, "
                "such as [int8, int4-g64], or list other components"
            )
        if {"low_rank", "pivoted_low_rank"} <= set(self.components):
            raise ValueError(
                "'components' may list low_rank or pivoted_low_rank, got both; keep "
                "pivoted_low_rank, which stores the same product in fewer bits"
            )
        return self

    @model_validator(mode="after")
    def _plain_if_served(self) -> "Mixed":
        if self.serve is None:
            return self
        types = ", ".join(self.component_types)
        unsupported = {
            f"components: [{types}] instead of [dense]": bool(types),
            f"measure: {self.measure} instead of bits": self.measure != "bits",
            "'embeddings'": self.embeddings is not None,
            "'lm_head'": self.lm_head is not None,
        }
        if problem := engine_problem(self.serve, self.schemes, unsupported):
            raise ValueError(problem)
        return self


LowRankMethod = Svd | Fwsvd | Asvd | SvdLlm | Lord | Kfac | BasisSharing
SparseMethod = Magnitude | Wanda | Sparse
DictionaryMethod = Cospadi | Compot | Rocket | Dictionary
Decompose = Annotated[
    LowRankMethod | SparseMethod | DictionaryMethod | TensorTrain | Mixed,
    Field(discriminator="method", description="Replace weight matrices by smaller components."),
]
