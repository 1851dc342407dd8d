"""Options of healing: training of the numbers that earlier stages left in the model."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.adapter_options import AdapterOptions
from lrc.configs.sources import Source
from lrc.configs.strict import Strict

Train = Annotated[
    Literal["all", "factors", "values", "scales", "norms", "lora", "s2ft", "compacter"],
    Field(
        description="What is trained; all other tensors keep their bits. `all`: everything in "
        "floating point except embedding and head; `factors`: low-rank components (WeLore); "
        "`values`: stored values of masks and dictionaries, at their places; `scales`: scales of "
        "integers, norms, and biases of quantized layers; `norms`: norms and biases (PERP); "
        "`lora`: low-rank adapters on all matrices, which are merged in the end (LoRA); "
        "`s2ft`: the same channels and heads in all matrices of an MLP or an attention that are "
        "stored in 16 bits (S2FT); `compacter`: sums of Kronecker products, merged into 16-bit "
        "matrices (Compacter)."
    ),
]

Support = Annotated[
    Literal["fixed", "moving"],
    Field(
        description="Whether values of masks and dictionaries keep their places. With `moving` all "
        "entries of a matrix are trained and the largest ones are used, always as many as are "
        "stored (DSFormer); this needs memory for all entries. Quantized values keep their places."
    ),
]

Rate = Annotated[
    float,
    Field(
        gt=0,
        lt=1,
        description="Highest learning rate, relative to the root mean square of each tensor: it "
        "rises over the first steps and then falls to zero as a cosine.",
    ),
]


class HealBase(Strict):
    """Options of every healing method."""

    method: str
    """What the compressed model is fitted to."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps; for `block`, of every fit of a layer. 150 (`block`: 100) if no other
    budget is given. 0 only measures."""
    tokens: PositiveInt | None = None
    """Instead of `steps`: training tokens, rounded up to whole steps."""
    minutes: Annotated[float, Field(gt=0, le=10080)] | None = None
    """Instead of `steps`: wall-clock time of the training, at most a week (10,080); for `block`, of
    all layers together.
    The number of steps then differs from run to run, and so does the result."""
    batch: Annotated[int, Field(ge=1, le=4096)] = 8
    """Windows per step, [1, 4096]."""
    rate: Rate = 1e-3
    held_out: PositiveInt = 16384
    """Tokens of the text that are never trained on; they choose the best step, and decide whether
    the result is used."""
    source: Source | None = None
    """Training text, as `calibration.source`, which is the default."""
    length: PositiveInt | None = None
    """Tokens per window; that of `calibration` if left out."""

    default_steps: ClassVar[int] = 150

    @model_validator(mode="after")
    def _one_budget(self) -> "HealBase":
        budgets = ("steps", "tokens", "minutes")
        given = [f"'{key}'" for key in budgets if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                "give at most one of 'steps', 'tokens' and 'minutes', got "
                f"{' and '.join(given)}; keep one"
            )
        return self

    @property
    def moves_support(self) -> bool:
        """Whether values change their places."""
        return False

    @property
    def seconds(self) -> float:
        """The limit of the time; 0 if there is none."""
        return 60 * (self.minutes or 0.0)

    def number_of_steps(self, length: int) -> int | None:
        """Return the number of steps with windows of `length` tokens; None if time is limited."""
        if self.minutes is not None:
            return None
        if self.tokens is not None:
            return -(-self.tokens // (self.batch * length))
        return self.default_steps if self.steps is None else self.steps


class Selective(AdapterOptions, HealBase):
    """Options of the methods that train a selection of parameters."""

    train: Train = "all"
    support: Support = "fixed"
    precondition: bool = False
    """Whether the two factors of a low-rank component are trained in coordinates in which the
    other one is orthonormal at first."""

    @property
    def moves_support(self) -> bool:
        """Whether values change their places."""
        return self.support == "moving"

    @model_validator(mode="after")
    def _values_move(self) -> "Selective":
        if self.moves_support and self.train not in ("all", "values"):
            raise ValueError(
                f"'support: moving' needs 'train' to be values or all, got {self.train}; change one"
            )
        return self


class LogitFit(HealBase):
    """Options of the methods that train the whole model."""

    divergence: Literal["forward", "reverse", "both"] = "forward"
    """The loss, a Kullback-Leibler divergence between the predictions of the dense model and those
    of the compressed one: with the dense model's as weights (`forward`), with the compressed
    model's (`reverse`), or the mean of both."""
    hidden: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a second term of the loss: the L1 distance between the outputs of every layer in
    the two models, relative to the dense one at each position, as a mean over positions and layers.
    Not after slices that change the residual stream."""
    cross_entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a third term of the loss: the cross entropy of the next token of the text, as a
    mean over positions. The best step is then the one with the lowest sum of the divergence and
    this term on held-out text."""
    checkpointing: bool = False
    """Recompute the inside of every layer for the backward pass: less memory, a third slower."""
    extend: bool = False
    """If the training takes more tokens than the text has, let the dense model continue random
    pieces of the text until there are enough, instead of repeating it, which overfits. Not with
    `minutes`."""
    micro_batch: PositiveInt | None = None
    """Windows that are computed at once; the gradients of a step are added up. Fewer need less
    memory. By default as many as hold 8,192 tokens on a GPU, 2,048 on a CPU."""

    @model_validator(mode="after")
    def _extends_to_a_number(self) -> "LogitFit":
        if self.extend and self.minutes is not None:
            raise ValueError(
                "'extend' needs a number of tokens, got 'minutes'; give 'tokens' or 'steps' "
                "instead, or remove it"
            )
        return self


class Distill(Selective, LogitFit):
    """Distillation: the whole model is trained to predict what the dense model predicts.

    An elastic model is trained with a random budget in every step.
    """

    method: Literal["distill"]
    nuclear_norm: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a further term of the loss: the sum of the singular values of all `low_rank`
    components in floating point. Afterwards, small ones are removed: ranks, and the size, fall."""
    truncate: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """With `nuclear_norm`: singular values of a component below this fraction of its largest one
    are removed, unless the result would be worse than before training, [0, 1)."""
    merge: bool = True
    """Of `lora`: whether integers are rounded to the sum with their adapters. Otherwise they stay,
    and the adapters are stored as low-rank components, which adds to the size."""


class Scales(LogitFit):
    """Distillation that changes only scales of integers, norms, and biases of quantized layers."""

    method: Literal["scales"]
    rate: Rate = 3e-3

    @property
    def train(self) -> Literal["scales"]:
        """What is trained."""
        return "scales"

    @property
    def precondition(self) -> bool:
        """Whether factors are trained in other coordinates; none is trained."""
        return False


class Block(Selective):
    """Each layer is trained to produce the dense layer's outputs; one layer is in memory."""

    method: Literal["block"]
    rate: Rate = 5e-3
    parts: Literal["together", "separate"] = "together"
    """Whether attention and MLP of a layer are trained together, to the output of the layer, or one
    after the other: attention to its own output, then the MLP to the output of the layer."""
    mix: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Fraction of the windows of a step that enter a layer as the dense model computes them; the
    others as the compressed layers before it do, [0, 1]."""
    samples: PositiveInt = 128
    """Number of training windows, whose hidden states are kept; they are used repeatedly."""

    default_steps: ClassVar[int] = 100


Heal = Annotated[
    Distill | Scales | Block,
    Field(
        discriminator="method",
        description="Train what is stored in floating point; integers stay unless they have "
        "adapters.",
    ),
]
