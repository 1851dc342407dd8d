"""What may be asked: the schema of a recipe.

Short forms (`model: path`, `calibration: c4`, `tasks: [piqa]`) are for people; a parsed recipe is
always fully written out. `Recipe.model_dump()` gives the form that is saved with a checkpoint.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from lrc.configs.size import SIZE, SIZE_REMEDY, SIZE_WORDS

Dtype = Literal["bfloat16", "float16", "float32"]
Text = Annotated[str, Field(min_length=1)]
Keep = Annotated[float, Field(gt=0, le=1)]
Size = Annotated[
    str, Field(pattern=SIZE, json_schema_extra={"x-words": SIZE_WORDS, "x-remedy": SIZE_REMEDY})
]
Damp = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Fraction of the mean diagonal of the input second moment that is added to it.",
    ),
]
Allocation = Annotated[
    Literal["uniform", "heavy-tail", "lagrangian"],
    Field(
        description="How the budget is spread: the same share for every matrix (`uniform`), by one "
        "threshold on the normalised singular values (`heavy-tail`, WeLore), or where the method "
        "predicts the least loss (`lagrangian`)."
    ),
]
PruningAllocation = Annotated[
    Literal["uniform", "lagrangian"],
    Field(
        description="How the budget is spread: the same share for every matrix (`uniform`), or "
        "where the method predicts the least loss (`lagrangian`)."
    ),
]
Storage = Annotated[
    Literal["factors", "pivot"],
    Field(
        description="Two factors, or some rows of their product and how the others follow (`pivot`,"
        " PIFA): lossless, and more rank for the same bits."
    ),
]


def _allow_short_form(schema: dict[str, Any], part: type["Strict"]) -> None:
    """Say in the JSON Schema what `Strict.short_form` says here."""
    if part.short_form is not None:
        kind, key = part.short_form
        short: dict[str, Any] = {"description": f"Short for `{{{key}: ...}}`."}
        if kind is str:
            short |= {"type": "string", "minLength": 1}
        else:
            short |= {"type": "array", "items": schema["properties"][key]["items"]}
        full = dict(schema)
        schema.clear()
        schema |= {"title": full["title"], "description": full["description"]}
        schema |= {"anyOf": [short, full], "x-short-form": key}


class Strict(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_allow_short_form,
    )

    short_form: ClassVar[tuple[type[str] | type[list[Any]], str] | None] = None
    """`(type, key)`: a bare value of that type stands for a mapping with that one key."""

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, value: Any) -> Any:
        if cls.short_form is not None and isinstance(value, cls.short_form[0]):
            return {cls.short_form[1]: value}
        return value


class Model(Strict):
    """The model to compress. Short form: its path."""

    short_form = (str, "path")

    path: Text
    """Hub id (`org/name`), local folder with safetensors, or `.gguf` file."""
    file: str | None = None
    """Name of a `.gguf` file inside the Hub repository `path`."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    dtype: Dtype = "bfloat16"
    """Precision of the reference model; bits are counted against it."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where it does not lie with the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless said here."""


class Calibration(Strict):
    """The text that the statistics are taken over. Short form: its source."""

    short_form = (str, "source")

    source: Text = "python-docs"
    """`python-docs` (packaged), `self` (sampled from the model), `c4`, `wikitext2`, or a path to a
    `.jsonl` or `.txt` file."""
    samples: PositiveInt = 32
    """Number of windows."""
    length: PositiveInt = 1024
    """Tokens a window."""
    field: str = "text"
    """The key that holds the text of a `.jsonl` row."""
    chat_template: bool = False
    """Render every document with the tokenizer's chat template (rows with `messages`, or plain
    text as one user turn)."""
    labels: Literal["model", "sampled", "real"] = "model"
    """What the loss of the output gradients compares with: the model's own distribution as a whole
    (`model`), one token drawn from it (`sampled`), or the token that follows (`real`)."""
    memory_limit_gib: Annotated[float, Field(gt=0)] = 2.0
    """Hidden states larger than this (GiB) are kept on disk."""


class Override(Strict):
    """Another budget for the matrices whose name matches."""

    match: Text
    """Shell pattern over full module names, e.g. `*.down_proj` or `model.layers.0.*`."""
    keep: Keep | None = None
    """Stored bits over the bits of the matrix in the source, (0, 1]."""
    rank: PositiveInt | None = None
    """Inner size of the factors."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Override":
        if (self.keep is None) == (self.rank is None):
            given = "neither" if self.keep is None else "both"
            raise ValueError(f"give exactly one of 'keep' and 'rank', got {given}")
        return self


class Compensate(Strict):
    """Let every layer make up for what the compressed layers before it lost."""

    mix: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the dense model's outputs in what the layer aims at; the rest are its own outputs
    on the inputs it will really see."""
    residual: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of what the residual stream lacks that layers writing to it try to make up for."""
    damp: Damp = 1e-4


class DecomposeBase(Strict):
    """What every decomposition method understands."""

    method: str
    """How the factors are found."""
    keep: Keep | None = None
    """Stored bits over the bits of the matrices in the source, (0, 1]."""
    size: Size | None = None
    """Instead of `keep`: size of the whole model's weight files, such as `180MiB`."""
    measure: Literal["bits", "macs"] = "bits"
    """What `keep` is a share of: stored bits, or multiply-adds a token."""
    allocation: Allocation = "uniform"
    rank_multiple: PositiveInt = 1
    """Ranks are multiples of it: 8 to 128 suit tensor cores and group sizes."""
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """No matrix keeps a smaller share than this."""
    max_loss: Annotated[float, Field(gt=0, le=1)] = 1.0
    """No matrix loses a larger share of its weighted energy; `lagrangian` only."""
    plan: Text | None = None
    """A plan (JSON) that an earlier run wrote, edited at will: its ranks replace the allocation."""
    storage: str
    """How what is found is written to the file."""
    compensate: Compensate | None = None
    """Refit every layer on the inputs that the compressed layers before it produce."""
    targets: list[str] = ["*"]
    """Shell patterns over module names; every linear of a decoder layer that matches one."""
    skip: list[str] = []
    """Shell patterns of linears to leave as they are; they do not count in `keep`."""
    overrides: list[Override] = []
    """Budgets by name; the first that matches wins."""

    @model_validator(mode="after")
    def _one_budget(self) -> "DecomposeBase":
        given = [name for name in ("keep", "size") if getattr(self, name) is not None]
        if len(given) == 2 or not (given or self.plan):
            text = "give exactly one of 'keep' and 'size', or a 'plan' that has the ranks"
            raise ValueError(f"{text}; got {' and '.join(given) or 'none of them'}")
        if self.size is not None and self.measure != "bits":
            raise ValueError(
                "'size' counts bytes and cannot be measured in 'macs'; give 'keep' instead"
            )
        if self.keep is not None and self.min_keep > self.keep:
            raise ValueError(
                f"'min_keep' must be at most 'keep', {self.keep:g}, got {self.min_keep:g}; "
                "lower min_keep or raise keep"
            )
        return self


class LowRank(DecomposeBase):
    """What every method understands that makes products of thinner matrices."""

    storage: Storage = "factors"


class Coded(DecomposeBase):
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
    gradient_damp: Annotated[float, Field(ge=0, lt=10)] = 0.1
    """Fraction of the mean diagonal of the gradient second moment that is added to it: the fewer
    calibration tokens, the more is needed."""
    allocation: Allocation = "lagrangian"
    storage: Storage = "pivot"


class BasisSharing(LowRank):
    """Basis Sharing: one right factor for the same matrix of several layers in a row."""

    method: Literal["basis-sharing"]
    """One right factor for several layers."""
    damp: Damp = 1e-6
    group_size: Annotated[int, Field(ge=2)] = 2
    """Layers that share."""
    storage: Literal["factors"] = "factors"
    """Two factors, of which the shared one is stored once: pivot rows cannot be shared."""
    compensate: None = None
    """Not with this method: its layers are solved together."""


class Pruning(Coded):
    """What every method understands that keeps some entries of a matrix."""

    storage: Literal["mask"] = "mask"
    """The entries that are kept, and one bit for every entry of the matrix."""


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
    gradient_damp: Annotated[float, Field(ge=0, lt=10)] = 0.1
    """Fraction of the mean diagonal of the gradient second moment that is added to it."""
    allocation: PruningAllocation = "lagrangian"


class Learning(Coded):
    """What every method understands that learns a dictionary: atoms, and few for every output.

    There are twice as many atoms as an output has coefficients.
    """

    storage: Literal["dictionary"] = "dictionary"
    """The atoms, the coefficients, and which atoms they are of."""
    damp: Damp = 1e-6


class Cospadi(Learning):
    """CoSpaDi: K-SVD with orthogonal matching pursuit behind whitening; slow."""

    method: Literal["cospadi"]
    """K-SVD with orthogonal matching pursuit."""
    rounds: PositiveInt = 60
    """Updates of coefficients and atoms."""


class TwoSidedLearning(Learning):
    """Outputs are weighted by their gradients, and losses predicted by both sides."""

    gradient_damp: Annotated[float, Field(ge=0, lt=10)] = 0.1
    """Fraction of the mean diagonal of the gradient second moment that is added to it."""
    allocation: PruningAllocation = "lagrangian"


class Compot(TwoSidedLearning):
    """COMPOT: an orthogonal dictionary by thresholding and Procrustes rotations."""

    method: Literal["compot"]
    """An orthogonal dictionary."""
    rounds: PositiveInt = 20
    """Updates of coefficients and atoms."""


class Rocket(TwoSidedLearning):
    """ROCKET: the eigenbasis, thresholded once, and the atoms refitted."""

    method: Literal["rocket"]
    """The eigenbasis, thresholded once."""


class Dictionary(TwoSidedLearning):
    """Hard-thresholding pursuit with refitted atoms, from the singular vectors."""

    method: Literal["dictionary"]
    """Hard-thresholding pursuit with refitted atoms."""
    rounds: PositiveInt = 15
    """Updates of coefficients and atoms."""


class Mixed(DecomposeBase):
    """Every matrix in the form that loses least at its share of one budget."""

    method: Literal["mixed"]
    """The best form for every matrix."""
    forms: Annotated[list[Literal["low-rank", "sparse", "dictionary"]], Field(min_length=1)] = [
        "low-rank",
        "sparse",
    ]
    """What a matrix may become, beside dense."""
    damp: Damp = 1e-6
    gradient_damp: Annotated[float, Field(ge=0, lt=10)] = 0.1
    """Fraction of the mean diagonal of the gradient second moment that is added to it."""
    rounds: PositiveInt = 15
    """Updates of coefficients and atoms of a dictionary."""
    allocation: Literal["lagrangian"] = "lagrangian"
    """The least predicted loss; there is no other way to choose between forms."""
    storage: Storage = "pivot"


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


class DecomposeStage(Strict):
    """Replace weight matrices by smaller factors."""

    decompose: Decompose
    """How the factors are found, and how small they get."""


Stage = DecomposeStage  # a union, as soon as there is a second kind


class Perplexity(Strict):
    """Perplexity per token on disjoint windows. Short form: its source."""

    short_form = (str, "source")

    source: Text
    """`python-docs`, `wikitext2`, `c4`, or a path to a `.jsonl` or `.txt` file."""
    name: str = ""
    """Name in the report; the source's own name if left out."""
    window: PositiveInt = 2048
    """Tokens a window."""
    windows: PositiveInt | None = None
    """Use only the first so many windows."""
    tokens: PositiveInt | None = None
    """Use only the first so many tokens of the text."""
    field: str = "text"
    """The key that holds the text of a `.jsonl` row."""

    @model_validator(mode="after")
    def _default_name(self) -> "Perplexity":
        if not self.name:
            stem = self.source.replace("\\", "/").rsplit("/", 1)[-1]
            object.__setattr__(self, "name", stem.rsplit(".", 1)[0] if "." in stem else stem)
        return self


class Tasks(Strict):
    """lm-eval tasks. Short form: a list of names."""

    short_form = (list, "names")

    names: list[str] = []
    """Tasks and groups, as `lm-eval ls tasks` lists them."""
    include_path: str | None = None
    """Folder of task files of one's own; names are looked up there first."""
    limit: PositiveInt | None = None
    """Use only the first so many documents of each task."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in front of every question; each task's own number if left out."""
    batch_size: PositiveInt = 8
    """Requests that are scored together."""
    apply_chat_template: bool = False
    """Ask through the tokenizer's chat template."""


class Gate(Strict):
    """A bar that the compressed model must clear, or the command exits with 4."""

    metric: Text
    """`perplexity.NAME` or `tasks.NAME.METRIC`."""
    at_most: float | None = None
    """Highest value that passes."""
    at_least: float | None = None
    """Lowest value that passes."""
    relative: bool = False
    """Compare compressed / dense instead of the compressed value itself."""

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        if self.at_most is None and self.at_least is None:
            raise ValueError("give 'at_most', 'at_least' or both, got neither")
        return self


class Evaluate(Strict):
    """How dense and compressed model are compared, in one run."""

    perplexity: list[Perplexity] = []
    """Texts to measure perplexity on."""
    tasks: Tasks = Tasks()
    """lm-eval tasks to score."""
    gates: list[Gate] = []
    """Bars that the compressed model must clear."""
    dense: bool = True
    """Evaluate the dense model beside the compressed one."""

    @model_validator(mode="after")
    def _results_have_one_name(self) -> "Evaluate":
        names = [each.name for each in self.perplexity]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            text = f"the names of the 'perplexity' entries must differ, got twice: {twice}"
            raise ValueError(f"{text}; give one of each pair another 'name'")
        return self


class Recipe(Strict):
    """One run: a model, the text to calibrate on, the stages in order, and how to judge."""

    model: Model
    """The model to compress."""
    calibration: Calibration = Calibration()
    """The text that the statistics are taken over."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    """What is done to the model, in order."""
    evaluate: Evaluate = Evaluate()
    """How dense and compressed model are compared."""
    output: Text
    """Folder for checkpoint and report."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Start of every random choice; same seed, same machine: same bytes."""
