"""What may be asked: the schema of a recipe.

Short forms (`model: path`, `calibration: c4`, `tasks: [piqa]`) are for people; a parsed recipe is
always fully written out. `Recipe.model_dump()` gives the form that is saved with a checkpoint.
"""

from itertools import pairwise
from math import lcm
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.methods import Decompose, FixedSize
from lrc.configs.quantize import SCHEME, Quantize
from lrc.configs.slicing import Slice
from lrc.configs.strict import Strict, Text

Dtype = Literal["bfloat16", "float16", "float32"]
Baseline = Annotated[
    str,
    Field(
        pattern=rf"^({SCHEME}|sparse)$",
        json_schema_extra={
            "x-words": "a baseline such as int8, int4-g64 or sparse",
            "x-remedy": "write int2 to int8, optionally followed by -gSIZE (SIZE numbers share a "
            "scale) and -asymmetric, or sparse",
        },
    ),
]


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


class DecomposeStage(Strict):
    """Replace weight matrices by smaller factors."""

    decompose: Decompose
    """How the factors are found, and how small they get."""


class SliceStage(Strict):
    """Cut layers or channels away: what is left is a smaller dense model."""

    slice: Slice
    """What is cut away, and how much."""


class QuantizeStage(Strict):
    """Round what is left to integers of few bits."""

    quantize: Quantize
    """How many bits, and how they are found."""


Stage = SliceStage | DecomposeStage | QuantizeStage
ORDER: tuple[type[Stage], ...] = (SliceStage, DecomposeStage, QuantizeStage)


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
    baselines: list[Baseline] = ["int8", "int4-g64"]
    """Simple compressions of the same layers whose perplexity is measured for comparison: integers
    by round-to-nearest (`int8`, `int4-g64` with one scale per 64 numbers, `int3-g64-asymmetric`
    with zero points), or the largest entries in as many bytes as the result (`sparse`). `[]`
    measures none."""

    @model_validator(mode="after")
    def _baselines_differ(self) -> "Evaluate":
        twice = sorted({name for name in self.baselines if self.baselines.count(name) > 1})
        if twice:
            raise ValueError(f"the 'baselines' must differ, got twice: {twice}; remove one")
        return self

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

    @model_validator(mode="after")
    def _in_order(self) -> "Recipe":
        kinds = [ORDER.index(type(stage)) for stage in self.stages]
        for index, (before, kind) in enumerate(pairwise(kinds), start=1):
            if kind < before:
                early, late = (next(iter(ORDER[k].model_fields)) for k in (kind, before))
                raise ValueError(
                    f"a '{early}' must stand before every '{late}', got stages[{index}] behind "
                    "one; move it to the front"
                )
        return self

    def stages_of(self, kind: str) -> dict[int, Any]:
        """Return the options of all stages of a kind, by their index in the recipe."""
        found = {index: vars(stage).get(kind) for index, stage in enumerate(self.stages)}
        return {index: options for index, options in found.items() if options is not None}

    @property
    def slices(self) -> list[Slice]:
        """What the first stages cut away, in order."""
        return [stage.slice for stage in self.stages if isinstance(stage, SliceStage)]

    @property
    def decompositions(self) -> dict[int, Decompose]:
        """Number of a stage -> what it decomposes, in order.

        Ranks are multiples of the group sizes of stages that will round them.
        """
        groups = [each.group_size or 1 for each in self.quantizations.values()]
        return {
            index: _in_groups(stage.decompose, lcm(*groups))
            for index, stage in enumerate(self.stages)
            if isinstance(stage, DecomposeStage)
        }

    @property
    def quantizations(self) -> dict[int, Quantize]:
        """Number of a stage -> how it rounds, in order."""
        return {
            index: stage.quantize
            for index, stage in enumerate(self.stages)
            if isinstance(stage, QuantizeStage)
        }

    @property
    def works(self) -> dict[int, Decompose | Quantize]:
        """Number of a stage -> what it does to single matrices, in order."""
        return {**self.decompositions, **self.quantizations}


def _in_groups(options: Decompose, group: int) -> Decompose:
    if group == 1 or isinstance(options, FixedSize):
        return options
    return options.model_copy(update={"rank_multiple": lcm(options.rank_multiple, group)})
