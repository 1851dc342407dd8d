"""Options of adapters: small trained differences to matrices, which are merged into them."""

from itertools import chain
from typing import ClassVar

from pydantic import PositiveInt, model_validator

from lrc.configs.strict import Strict


class AdapterOptions(Strict):
    """Options of the values of `train` that train a difference to a matrix."""

    rank: PositiveInt | None = None
    """Rank of the adapters of `lora`. 16 if left out."""

    uses: ClassVar[dict[str, tuple[str, ...]]] = {"lora": ("rank", "merge")}
    """Value of `train` -> the options here that it has."""
    default_ranks: ClassVar[dict[str, int]] = {"lora": 16}

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
