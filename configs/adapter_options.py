"""Options of adapters: small trained differences to matrices, which are merged into them."""

from itertools import chain
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.strict import Strict


class AdapterOptions(Strict):
    """Options of the values of `train` that train a difference to a matrix."""

    rank: PositiveInt | None = None
    """Rank of the adapters of `lora`, 16 if left out; or of the large factors of the Kronecker
    products of `compacter`, 1 if left out."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Of `s2ft`: fraction of the channels of every MLP, and of the heads of every attention, that
    are trained, rounded to whole ones. (0, 1]."""
    choose: Literal["random", "norm"] = "random"
    """Of `s2ft`: whether they are drawn at random, or are those with the largest weights."""
    terms: Annotated[int, Field(ge=2, le=64)] = 4
    """Of `compacter`: number of Kronecker products, and the width of their small factors, [2, 64].
    Matrices with sides that it does not divide are not trained."""
    share: bool = True
    """Of `compacter`: whether all adapters have the same small factors; with `block`, those of a
    layer."""

    uses: ClassVar[dict[str, tuple[str, ...]]] = {
        "lora": ("rank", "merge"),
        "s2ft": ("fraction", "choose"),
        "compacter": ("rank", "terms", "share"),
    }
    """Value of `train` -> the options that only such values have."""
    default_ranks: ClassVar[dict[str, int]] = {"lora": 16, "compacter": 1}

    @model_validator(mode="after")
    def _only_used(self) -> "AdapterOptions":
        train: str = getattr(self, "train", "")
        for name in dict.fromkeys(chain(*self.uses.values())):
            field = type(self).model_fields.get(name)
            if field is None or name in self.uses.get(train, ()):
                continue
            if getattr(self, name) == field.default:
                continue  # a recipe that is written out in full has all options
            users = [each for each, names in self.uses.items() if name in names]
            raise ValueError(
                f"'{name}' is an option of 'train: {' or '.join(users)}', got 'train: {train}'; "
                f"remove '{name}', or change 'train'"
            )
        return self

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapters."""
        return self.rank or self.default_ranks[getattr(self, "train", "")]
