"""Options of quantization: integer formats, and how the integers are found."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.decompose import Compensate
from lrc.configs.engines import Serve, engine_problem
from lrc.configs.strict import Damp, Strict

SCHEME = r"int[2-8]((-g[1-9][0-9]{0,8})?(-asymmetric)?|-g(1|2|4|8|16|32|64|128|256)-s256)"
"""Pattern of an integer format, without anchors."""

SchemeName = Annotated[
    str,
    Field(
        pattern=f"^{SCHEME}$",
        json_schema_extra={
            "x-words": "an integer format such as int8, int4-g64 or int3-g32-asymmetric",
            "x-remedy": "write int2 to int8, optionally followed by -gSIZE (SIZE numbers of a row "
            "share a scale) and -asymmetric, or -s256 for super-blocks of 256 as in K-quants",
        },
    ),
]
Quantizer = Annotated[
    Literal["gptq", "rtn"],
    Field(
        description="`gptq`: quantize column by column; later columns compensate for the error on "
        "the calibration text. `rtn`: round every number to the nearest."
    ),
]
ActOrder = Annotated[
    bool,
    Field(description="With `gptq`: quantize the columns with the largest inputs first."),
]
Balance = Annotated[
    Literal["measured", "first", "quarter", "even", "rotated"],
    Field(
        description="How the singular values are divided between two factors before they are "
        "quantized; the product stays the same. `first`: all in the factor that is applied first; "
        "`quarter`, `even`: with the exponent 1/4 or 1/2 in the other factor; `rotated`: as "
        "`even`, with a random rotation between the factors; `measured`: whichever has the least "
        "error, for each layer."
    ),
]
Embeddings = Annotated[
    SchemeName | None,
    Field(
        description="Integer format of the input embedding, and of an lm_head tied to it, such as "
        "`int8`; round-to-nearest. Not quantized if left out."
    ),
]
LmHead = Annotated[
    SchemeName | None,
    Field(
        description="Integer format of an lm_head that is not tied to the embedding; "
        "round-to-nearest. Not quantized if left out."
    ),
]


class LowRankCorrection(Strict):
    """A low-rank product in floating point that is added to the integers of a whole weight."""

    method: Literal["qera", "eora", "lqer"] = "qera"
    """Metric under which the quantization error is approximated: the second moment of the inputs
    (`qera`, exact), only its eigenvalues (`eora`), or only its diagonal (`lqer`)."""
    rank: PositiveInt = 32
    """Rank of the product."""


class Quantize(Strict):
    """Store weights as integers: those that earlier stages compressed, and all others."""

    method: Literal["gptq", "rtn", "gqsa"]
    """`gptq`: quantize column by column; later columns compensate for the error on the calibration
    text. `rtn`: round every number to the nearest. `gqsa`: remove the least important groups, then
    as `gptq`."""
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    """Bits per integer."""
    group_size: PositiveInt | None = None
    """Consecutive numbers of a row that share a scale; the whole row if left out. Ranks of earlier
    stages become multiples of it."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """With `gqsa`: fraction of the groups of every matrix that is removed; 0.5 if left out."""
    symmetric: bool = True
    """Center the range of integers at 0; `false` stores a zero point with every scale."""
    act_order: ActOrder = True
    balance: Balance = "measured"
    damp: Damp = 0.01
    compensate: Compensate | None = None
    """Refit every layer on inputs from the quantized layers before it; `{}` for the defaults."""
    low_rank_correction: LowRankCorrection | None = None
    """Correct part of the quantization error of each layer that no earlier stage has factored."""
    embeddings: Embeddings = None
    lm_head: LmHead = None
    serve: Serve = None
    targets: list[str] = ["*"]
    """Shell patterns of module names; all linear layers of decoder layers by default. `[]`
    quantizes none of them, only 'embeddings' or 'lm_head'."""
    ignore: list[str] = []
    """Shell patterns of linear layers to leave unchanged."""

    @model_validator(mode="after")
    def _no_options_without_targets(self) -> "Quantize":
        if self.rounds_linears:
            return self
        linears = set(type(self).model_fields) - {"method", "targets", "embeddings", "lm_head"}
        idle = sorted(
            key for key in linears if getattr(self, key) != type(self).model_fields[key].default
        )
        if idle or self.method == "gqsa":
            got = ", ".join(f"'{key}'" for key in idle) or "method: gqsa"
            raise ValueError(
                f"targets: [] selects no linear layer, so that {got} has no effect; remove what "
                "has no effect, or list 'targets'"
            )
        return self

    @model_validator(mode="after")
    def _options_of_gqsa(self) -> "Quantize":
        if self.method != "gqsa":
            if self.sparsity is not None:
                raise ValueError(
                    "'sparsity' is the fraction of groups that method: gqsa removes, got it with "
                    f"method: {self.method}; remove the key, or choose gqsa"
                )
            return self
        if self.group_size is None:
            raise ValueError(
                "method: gqsa removes groups of numbers and needs a 'group_size', got none; add "
                "one, such as 16"
            )
        if not self.symmetric:
            raise ValueError(
                "method: gqsa stores no zero points, got symmetric: false; remove the key, or "
                "choose gptq"
            )
        if self.low_rank_correction is not None:
            raise ValueError(
                "'low_rank_correction' needs whole weights, got it with method: gqsa; remove it, "
                "or choose gptq"
            )
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.5)  # the paper's main setting
        return self

    @model_validator(mode="after")
    def _plain_if_served(self) -> "Quantize":
        if self.serve is None:
            return self
        unsupported = {
            "method: gqsa": self.method == "gqsa",
            "'low_rank_correction'": self.low_rank_correction is not None,
            "symmetric: false": not self.symmetric,
            "'embeddings'": self.embeddings is not None,
            "'lm_head'": self.lm_head is not None,
        }
        if problem := engine_problem(self.serve, [self.scheme], unsupported):
            raise ValueError(problem)
        return self

    @property
    def rounds_linears(self) -> bool:
        """Whether linear layers of decoder layers are quantized too."""
        return bool(self.targets) or (self.embeddings is None and self.lm_head is None)

    @property
    def scheme(self) -> str:
        """Bits, group size and symmetry as plans and checkpoints write them."""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"int{self.bits}{group}{'' if self.symmetric else '-asymmetric'}"
