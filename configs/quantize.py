"""What may be asked of rounding: how many bits, for how many numbers a scale, and how."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.decompose import Compensate, Damp
from lrc.configs.strict import Strict

SCHEME = r"int[2-8](-g[1-9][0-9]{0,8})?(-asymmetric)?"
SchemeName = Annotated[
    str,
    Field(
        pattern=f"^{SCHEME}$",
        json_schema_extra={
            "x-words": "written like int8, int4-g64 or int3-g32-asymmetric, 2 to 8 bits",
            "x-remedy": "write intBITS, then -gSIZE for a scale every SIZE numbers of a row",
        },
    ),
]
Quantizer = Annotated[
    Literal["gptq", "rtn"],
    Field(
        description="Round one column after the other, those behind it making up for the error on "
        "the calibration tokens (`gptq`), or every number to the nearest (`rtn`)."
    ),
]
Balance = Annotated[
    Literal["measured", "first", "quarter", "even", "rotated"],
    Field(
        description="Where the singular values of two factors sit before they are rounded, which "
        "their product does not show: all in the factor that is applied first (`first`), a quarter "
        "of each in the other (`quarter`), half (`even`), half and the inner space turned at "
        "random (`rotated`), or whichever loses least in every layer (`measured`)."
    ),
]


Embeddings = Annotated[
    SchemeName | None,
    Field(
        description="Integers for the input embedding, such as `int8`, and with it for a head that "
        "is tied to it; rounded to the nearest. Left as they are if left out."
    ),
]
LmHead = Annotated[
    SchemeName | None,
    Field(
        description="Integers for a head that is not tied to the embedding; rounded to the "
        "nearest. Left as it is if left out."
    ),
]

CorrectionMethod = Literal["qera", "eora", "lqer"]


class LowRankCorrection(Strict):
    """A low-rank product in floating point that is added to the integers of a whole weight."""

    method: Annotated[
        CorrectionMethod,
        Field(
            description="Under which metric it is closest to what rounding lost: the second moment "
            "of the inputs (`qera`, exact), its eigenvalues alone (`eora`), or its diagonal "
            "(`lqer`)."
        ),
    ] = "qera"
    rank: PositiveInt = 32
    """Inner size of the factors."""


class Quantize(Strict):
    """Round what earlier stages have left, and the linears that no stage touches, to integers."""

    method: Annotated[
        Literal["gptq", "rtn", "gqsa"],
        Field(
            description="How the integers are found: one column after the other, those behind it "
            "making up for the error on the calibration tokens (`gptq`), every number to the "
            "nearest (`rtn`), or as `gptq` once the groups that matter least are removed (`gqsa`)."
        ),
    ]
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    """Of one integer."""
    group_size: PositiveInt | None = None
    """Numbers of a row that share a scale; all of a row if left out. Ranks of earlier stages become
    multiples of it."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """With `gqsa`: share of the groups of every matrix that is removed; 0.5 if left out."""
    symmetric: bool = True
    """Whether 0 is in the middle of the range; else every scale has a zero point of its own."""
    act_order: bool = True
    """Quantize the columns with the largest inputs first; without effect on `rtn`."""
    balance: Balance = "measured"
    damp: Damp = 0.01
    compensate: Compensate | None = None
    """Fit every layer to the inputs that the rounded layers before it produce."""
    low_rank_correction: LowRankCorrection | None = None
    """Correct part of the quantization error of each layer that no earlier stage has factored."""
    embeddings: Embeddings = None
    lm_head: LmHead = None
    targets: list[str] = ["*"]
    """Shell patterns over module names; every linear of a decoder layer that matches one. `[]`
    rounds none, beside 'embeddings' or 'lm_head'."""
    ignore: list[str] = []
    """Shell patterns of linear layers to leave unchanged."""

    @model_validator(mode="after")
    def _says_nothing_of_linears_it_leaves(self) -> "Quantize":
        if self.rounds_linears:
            return self
        linears = set(type(self).model_fields) - {"method", "targets", "embeddings", "lm_head"}
        idle = sorted(
            key for key in linears if getattr(self, key) != type(self).model_fields[key].default
        )
        if idle or self.method == "gqsa":
            got = ", ".join(f"'{key}'" for key in idle) or "method: gqsa"
            raise ValueError(
                f"targets: [] rounds no linear, to which {got} would apply; remove what applies to "
                "none, or give 'targets'"
            )
        return self

    @model_validator(mode="after")
    def _removes_groups(self) -> "Quantize":
        if self.method != "gqsa":
            if self.sparsity is not None:
                raise ValueError(
                    f"'sparsity' is the share of groups that method: gqsa removes, got it with "
                    f"method: {self.method}; remove the key, or take gqsa"
                )
            return self
        if self.group_size is None:
            raise ValueError(
                "method: gqsa removes groups of numbers and needs a 'group_size', got none; give "
                "one, such as 16"
            )
        if not self.symmetric:
            raise ValueError(
                "method: gqsa stores no zero points, got symmetric: false; remove the key, or take "
                "gptq"
            )
        if self.low_rank_correction is not None:
            raise ValueError(
                "a 'low_rank_correction' needs whole weights, got it with method: gqsa; remove it, "
                "or take gptq"
            )
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.5)  # the paper's main setting
        return self

    @property
    def rounds_linears(self) -> bool:
        """Whether linears of the layers are to be rounded too."""
        return bool(self.targets) or (self.embeddings is None and self.lm_head is None)

    @property
    def scheme(self) -> str:
        """Return bits, group and symmetry as plans and checkpoints write them."""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"int{self.bits}{group}{'' if self.symmetric else '-asymmetric'}"
