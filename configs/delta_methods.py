"""Options of `lrc delta make`: how the difference between two models is compressed."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError, model_validator

from lrc.configs.decompose import Keep, Size
from lrc.configs.errors import UsageError
from lrc.configs.explain import explain
from lrc.configs.overrides import apply_override, read_overrides
from lrc.configs.places import Places
from lrc.configs.recipe import Calibration
from lrc.configs.shape import Shape
from lrc.configs.strict import Strict

Density = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Fraction of the numbers of every tensor that are changed: those with the "
        "largest differences.",
    ),
]


Balance = Annotated[
    Literal["measured", "stored", "even", "rotated"],
    Field(
        description="Of adapters: which of the factors with the same product are compressed. "
        "`stored`: those of the adapter; `even`: singular vectors times the square roots of the "
        "singular values; `rotated`: these with a random rotation between them; `measured`: "
        "whichever has the least error, for each layer."
    ),
]


class Ternary(Strict):
    """Signs of the largest differences, and one scale per tensor (ComPEFT)."""

    method: Literal["ternary"]
    density: Density = 0.1
    scale: Literal["least-squares", "std"] = "least-squares"
    """What the scale is: that of the least squared error, of adapters the error of the product; or
    the standard deviation of all differences of the tensor, as in the paper."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the scale. The paper chooses it on a validation set. Of adapters it applies to the
    product with `least-squares`, and to both factors with `std`."""
    balance: Balance = "measured"


class LowRank(Strict):
    """A product of two factors for every matrix; other tensors are stored as they are."""

    method: Literal["low-rank"]
    rank: PositiveInt | None = None
    """Rank of every matrix."""
    keep: Keep | None = None
    """Instead of `rank`: numbers of the factors over those of the matrix, or of the adapter. 0.1
    if none of `rank`, `keep` and `size` is given."""
    size: Size | None = None
    """Instead of `rank`: bytes of all tensors of the delta, such as `2MiB`. Ranks are chosen so
    that the squared error of all matrices together is smallest."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the factors."""
    calibration: Calibration | None = None
    """Text on which the tuned model is calibrated: errors are weighted by the second moments of
    inputs and output gradients. All errors count the same if left out."""
    gradients: bool = True
    """Of `calibration`: whether to weight by the gradients too, which needs a backward pass."""

    default_keep: ClassVar[float] = 0.1

    @model_validator(mode="after")
    def _one_size(self) -> "LowRank":
        given = [f"'{key}'" for key in ("rank", "keep", "size") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give at most one of 'rank', 'keep' and 'size', got {' and '.join(given)}; "
                "keep one"
            )
        return self

    @model_validator(mode="after")
    def _gradients_of_the_calibration(self) -> "LowRank":
        if self.calibration is None and "gradients" in self.model_fields_set:
            raise ValueError(
                f"'gradients' is an option of 'calibration', got {self.gradients} and no "
                "'calibration'; name a text, or leave 'gradients' out"
            )
        return self


class Integers(Strict):
    """Differences rounded to integers that share scales."""

    method: Literal["int"]
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: PositiveInt = 64
    """Consecutive numbers of a tensor that share a scale."""
    balance: Balance = "measured"


class Sparse(Strict):
    """The largest differences; all other numbers are those of the base model."""

    method: Literal["sparse"]
    density: Density = 0.05
    values: Literal["exact", "bfloat16"] = "exact"
    """What is stored at these places: the numbers of the tuned model in its precision, or the
    differences in bfloat16, which is smaller if the tuned model is in float32."""
    balance: Balance = "measured"


DeltaMethod = Ternary | LowRank | Integers | Sparse
_ADAPTER: TypeAdapter[DeltaMethod] = TypeAdapter(
    Annotated[DeltaMethod, Field(discriminator="method")]
)


def parse_delta_method(method: str, options: Sequence[str]) -> DeltaMethod:
    """Read the options of a method, written as `key=value`.

    Raises
    ------
    UsageError
        With every unknown method, unknown key and value out of range.
    """
    assignments, problems = read_overrides(options)
    shape = Shape(_ADAPTER.json_schema())
    places: Places = {(): "", ("method",): ""}
    value: dict[str, Any] = {"method": method}
    for each in assignments:
        problems += apply_override(value, each, shape, places)
    try:
        found = _ADAPTER.validate_python(value, strict=True)
    except ValidationError as error:
        problems += explain(error, value, shape, places)
    if problems:
        raise UsageError(problems)
    return found
