"""What may be asked of a method of slicing: a budget of the whole model's bytes, and how."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.decompose import Damp, Keep, Size
from lrc.configs.strict import Strict


class SliceBase(Strict):
    """What every slicing method understands."""

    method: str
    """What is cut away."""
    keep: Keep | None = None
    """Bytes of the whole smaller model over those of the model that the stage is given, (0, 1]."""
    size: Size | None = None
    """Instead of `keep`: size of the whole model's weight files, such as `180MiB`."""

    @model_validator(mode="after")
    def _one_budget(self) -> "SliceBase":
        if (self.keep is None) == (self.size is None):
            given = "neither" if self.keep is None else "both"
            raise ValueError(f"give exactly one of 'keep' and 'size', got {given}")
        return self


class Drop(SliceBase):
    """Whole layers: those whose output is most like their input."""

    method: Literal["drop"]
    """Whole layers, by how little they change."""
    criterion: Literal["influence", "perplexity"] = "influence"
    """Choose by the cosine between a layer's input and output (`influence`, ShortGPT), or take
    away one after the other the layer whose absence costs least perplexity on the calibration
    text (`perplexity`, SLEB; slower)."""


class Modegpt(SliceBase):
    """Channels of MLPs and of attention heads, and a refit of what reads them."""

    method: Literal["modegpt"]
    """Channels inside attention and MLPs."""
    damp: Annotated[Damp, Field(gt=0)] = 1e-4
    heads: bool = True
    """Narrow attention heads too; otherwise MLPs alone."""
    uniform: bool = True
    """Give the MLPs of all layers one width: what is left is a plain checkpoint. Otherwise each
    gets the width that the data ask for, and `lrc` is needed to load what is left."""
    allocation: Literal["influence", "lagrangian"] = "influence"
    """Without `uniform`: take from the layers that change their input least (`influence`, as in
    MoDeGPT), or where the predicted loss rises least (`lagrangian`, which reads gradients and was
    worse where it was measured)."""
    width_multiple: PositiveInt = 8
    """Widths are multiples of it, as tensor cores want."""


class Slicegpt(SliceBase):
    """The residual stream, by rotation onto its principal components."""

    method: Literal["slicegpt"]
    """Width of the residual stream."""
    rotations: Literal["global", "block"] = "global"
    """One rotation for the whole model, which leaves a plain checkpoint (`global`), or one before
    every block as in the paper, whose shortcuts take room and need `lrc` to be loaded (`block`)."""
    width_multiple: PositiveInt = 8
    """The width is a multiple of it, as tensor cores want; of a Llama also of its number of heads,
    which its config demands."""


Slice = Annotated[Drop | Modegpt | Slicegpt, Field(discriminator="method")]
