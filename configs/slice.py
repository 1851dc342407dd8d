"""Options of the slicing methods, which remove layers or channels of the model."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.decompose import Keep, Size
from lrc.configs.strict import Damp, Strict


class SliceBase(Strict):
    """Options of every slicing method."""

    method: str
    """What is removed."""
    keep: Keep | None = None
    """Bytes of the whole smaller model over those of the model before this stage, (0, 1]."""
    size: Size | None = None
    """Instead of `keep`: size of the weight files of the whole model, such as `180MiB`."""

    @model_validator(mode="after")
    def _one_budget(self) -> "SliceBase":
        if (self.keep is None) == (self.size is None):
            given = "neither" if self.keep is None else "both"
            raise ValueError(f"give exactly one of 'keep' and 'size', got {given}")
        return self


class Drop(SliceBase):
    """Whole layers, those that matter least."""

    method: Literal["drop"]
    criterion: Literal["influence", "perplexity"] = "influence"
    """How layers are ranked: by the cosine between their input and output (`influence`, ShortGPT),
    or by removing, one after the other, the layer whose removal costs the least perplexity on the
    calibration text (`perplexity`, SLEB; slower)."""


class Modegpt(SliceBase):
    """MoDeGPT: channels of MLPs and of attention heads; the next layers are refitted."""

    method: Literal["modegpt"]
    damp: Annotated[Damp, Field(gt=0)] = 1e-4
    heads: bool = True
    """Narrow attention heads too; `false`: MLPs only."""
    uniform: bool = True
    """One width for the MLPs of all layers, which gives a plain checkpoint. `false`: a separate
    width for each layer, and `lrc` is needed to load the checkpoint."""
    allocation: Literal["influence", "lagrangian"] = "influence"
    """Without `uniform`: narrow the layers that change their input least (`influence`, as in
    MoDeGPT), or those where the predicted loss rises least (`lagrangian`, which needs gradients and
    was worse in our measurements)."""
    width_multiple: PositiveInt = 8
    """Widths are multiples of this number of channels, for tensor cores."""


class Slicegpt(SliceBase):
    """SliceGPT: width of the residual stream, after rotation to its principal components."""

    method: Literal["slicegpt"]
    rotations: Literal["global", "block"] = "global"
    """One rotation for the whole model, which gives a plain checkpoint (`global`), or one before
    every block as in the paper (`block`), whose shortcut matrices take space and need `lrc` to be
    loaded."""
    width_multiple: PositiveInt = 8
    """The width is a multiple of this number of channels, for tensor cores; for Llama also of the
    number of heads, as its config requires."""


class Reap(SliceBase):
    """REAP: experts of mixture-of-experts layers, those that add least to the output."""

    method: Literal["reap"]


class Ream(SliceBase):
    """REAM: experts of mixture-of-experts layers, which are merged into the others."""

    method: Literal["ream"]
    group_size: Annotated[int, Field(ge=2)] = 16
    """Largest number of experts that are merged into one. With larger groups, fewer of the kept
    experts change."""


Slice = Annotated[
    Drop | Modegpt | Slicegpt | Reap | Ream,
    Field(
        discriminator="method",
        description="Remove layers, experts or channels; the result is a smaller dense model.",
    ),
]
