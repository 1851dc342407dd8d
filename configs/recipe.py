"""The schema of a recipe.

Short forms (`model: path`, `calibration: c4`, `tasks: [piqa]`) are for people; a parsed recipe is
always fully written out. `Recipe.model_dump()` gives the form that is saved with a checkpoint.
"""

from itertools import pairwise
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import ConfigDict, Field, PositiveInt, create_model, model_validator

from lrc.configs.decompose_methods import Decompose
from lrc.configs.gate_text import parse_gate
from lrc.configs.heal import Heal
from lrc.configs.quantize import SCHEME, Quantize
from lrc.configs.size import size_words
from lrc.configs.slice import Slice
from lrc.configs.sources import Source, counts
from lrc.configs.strict import Strict, Text, repeated
from lrc.configs.task_data import CalibrationTask, EvaluationTask

Baseline = Annotated[
    str,
    Field(
        pattern=rf"^({SCHEME}|sparse)$",
        json_schema_extra={
            "x-words": "a baseline such as int8, int4-g64 or sparse",
            "x-remedy": "write int2 to int8, optionally followed by -gSIZE (SIZE numbers of a row "
            "share a scale) and -asymmetric, or sparse",
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
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the source model, against which compressed bits are counted."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not stored with the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Calibration(Strict):
    """The calibration text, over which statistics are computed. Short form: its source."""

    short_form = (str, "source")

    source: Source = "python-docs"
    """`python-docs` (the help topics of the installed Python), `self` (sampled from the model),
    `c4`, `wikitext2`, or a path to a `.jsonl` or `.txt` file; of a long file, evenly spaced
    excerpts are used. Several sources are written with their fractions, as in
    `{c4: 0.5, self: 0.5}`."""
    task: CalibrationTask | None = None
    """Examples to use instead of windows of a text: for encoders and encoder-decoder models."""
    samples: PositiveInt = 32
    """Number of windows, or of examples of a task."""
    length: PositiveInt = 1024
    """Tokens per window; of an encoder-decoder model, the first half is the source text, and the
    second half the target."""
    field: str = "text"
    """The key that holds the text of a `.jsonl` row."""
    chat_template: bool = False
    """Render every document with the tokenizer's chat template (rows with `messages`, or plain
    text as one user turn)."""
    labels: Literal["model", "sampled", "real"] = "model"
    """Targets of the loss whose gradients are computed: the model's own distribution (`model`), one
    token sampled from it (`sampled`), or the actual next token (`real`). Of a classifier, the label
    is that of the whole example, and `real`, the label in the data, is the default if `task` has a
    column of labels."""
    loss: Literal["all", "answers"] = "all"
    """Tokens that count in this loss: all of them, or with `chat_template` only `answers`, the
    contents of the assistant's messages. Text without messages always counts."""
    memory_limit_gib: Annotated[float, Field(gt=0)] = 2.0
    """Hidden states larger than this (GiB) are kept on disk."""
    disk_limit_gib: Annotated[float, Field(gt=0)] | None = None
    """Statistics larger than this (GiB) are collected for a few layers at a time, in more passes
    over the text; the result is the same. What is free on the disk if left out."""

    @model_validator(mode="after")
    def _a_window_of_every_source(self) -> "Calibration":
        for name, windows in counts(self.source, self.samples).items():
            if windows == 0:
                raise ValueError(
                    f"'samples' must give every source a window, got {self.samples} and none for "
                    f"{name}; raise it"
                )
        return self

    @model_validator(mode="after")
    def _answers_of_conversations(self) -> "Calibration":
        if self.loss == "answers" and not self.chat_template:
            raise ValueError(
                "loss: answers needs conversations (rows with 'messages'), got chat_template: "
                "false; set chat_template: true, or loss: all"
            )
        return self

    @model_validator(mode="after")
    def _labels_of_the_task(self) -> "Calibration":
        if self.task is None:
            return self
        text = sorted({"source", "field", "chat_template", "length"} & self.model_fields_set)
        changed = [
            key for key in text if getattr(self, key) != type(self).model_fields[key].default
        ]
        if changed:
            keys = ", ".join(f"'{key}'" for key in changed)
            raise ValueError(
                f"'task' replaces the calibration text, got also {keys}; remove one of them (a "
                "task has its own 'length')"
            )
        if self.task.label is not None and "labels" not in self.model_fields_set:
            object.__setattr__(self, "labels", "real")
        if self.labels == "real" and self.task.label is None and self.task.target is None:
            raise ValueError(
                "labels: real needs the column of the labels or of the targets, got a 'task' "
                "without 'label' and 'target'; name the column, or choose labels: model"
            )
        return self

    @property
    def window(self) -> int:
        """Tokens per window, or per example of a task."""
        return self.length if self.task is None else self.task.tokens

    def of(self, source: str, samples: int) -> "Calibration":
        """Return the same options for one source and a number of windows."""
        return self.model_copy(update={"source": source, "samples": samples})


class Perplexity(Strict):
    """Perplexity per token on disjoint windows. Short form: its source."""

    short_form = (str, "source")

    source: Text
    """`python-docs`, `wikitext2`, `c4`, or a path to a `.jsonl` or `.txt` file."""
    name: str = ""
    """Name in the report; that of the source if left out."""
    window: PositiveInt = 2048
    """Tokens per window; of an encoder-decoder model, the first half is the source text, and the
    second half is predicted."""
    windows: PositiveInt | None = None
    """Highest number of windows; the whole text if left out."""
    tokens: PositiveInt | None = None
    """Highest number of tokens of the text; all if left out."""
    field: str = "text"
    """The key that holds the text of a `.jsonl` row."""

    @model_validator(mode="after")
    def _default_name(self) -> "Perplexity":
        if not self.name:
            object.__setattr__(self, "name", PureWindowsPath(self.source).stem)  # / or \\
        return self

    @model_validator(mode="after")
    def _holds_a_window(self) -> "Perplexity":
        if self.tokens is not None and self.tokens < self.window:
            raise ValueError(
                f"'tokens' must be at least 'window', {self.window:,}, got {self.tokens:,}; raise "
                "'tokens' or lower 'window'"
            )
        return self


class Tasks(Strict):
    """lm-eval tasks. Short form: a list of names."""

    short_form = (list, "names")

    names: list[str] = []
    """Tasks and groups, as `lm-eval ls tasks` lists them."""
    include_path: str | None = None
    """Folder with additional task files; its tasks take precedence."""
    limit: PositiveInt | None = None
    """Highest number of documents of each task; all if left out."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before every question; each task's default if left out."""
    batch_size: PositiveInt = 8
    """Requests that are scored together."""
    apply_chat_template: bool = False
    """Format requests with the tokenizer's chat template."""


class Generations(Strict):
    """Prompts that both models continue, greedily. Short form: a list of prompts."""

    short_form = (list, "prompts")

    prompts: list[Text] = []
    """Texts to continue."""
    file: Text | None = None
    """A `.txt` file with a prompt on every line, or a `.jsonl` file with the key `prompt`."""
    tokens: PositiveInt = 64
    """Tokens to generate, at most."""


class Gate(Strict):
    """A threshold; the command exits with 4 if the compressed model misses it.

    Short form: a comparison, `perplexity.c4 <= 1.02x`.
    """

    short_form = (str, "metric")
    short_words = "A comparison such as `perplexity.c4 <= 1.02x`; x: relative."

    metric: Text
    """`perplexity.NAME`, `kl.NAME` (KL divergence from the dense model, nats per token),
    `agreement.NAME` (fraction of positions with the same most likely token),
    `tasks.NAME.METRIC` (of an encoder, `accuracy` or `similarity`; of an encoder-decoder model,
    `perplexity`), or `size` (bytes of the weight
    files)."""
    at_most: float | None = None
    """Highest value that passes."""
    at_least: float | None = None
    """Lowest value that passes."""
    relative: bool = False
    """Compare compressed / dense instead of the compressed value."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        return parse_gate(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        if self.at_most is None and self.at_least is None:
            raise ValueError("give 'at_most', 'at_least' or both, got neither")
        return self

    def __str__(self) -> str:
        bounds = (("<=", self.at_most), (">=", self.at_least))
        written = (f"{self.metric} {s} {self.limit(v)}" for s, v in bounds if v is not None)
        return " and ".join(written)

    def limit(self, value: float) -> str:
        """Return a bound as a comparison writes it: ``1.02x``, ``80MiB``."""
        if self.relative:
            return f"{value:g}x"
        return size_words(value) if self.metric == "size" else f"{value:g}"


class Evaluate(Strict):
    """How the dense and the compressed model are compared, in one run."""

    perplexity: list[Perplexity] = []
    """Texts to measure perplexity on."""
    tasks: Tasks = Tasks()
    """lm-eval tasks to score."""
    task: EvaluationTask | None = None
    """Examples to score a model on: for encoders and encoder-decoder models."""
    gates: list[Gate] = []
    """Quality thresholds for the compressed model."""
    dense: bool = True
    """Evaluate the dense model too."""
    kl_tokens: Annotated[int, Field(ge=0)] = 32768
    """Tokens of every `perplexity` text, from its start and in whole windows, on which the
    predictions of both models are compared: KL divergence and top-1 agreement. 0 compares none."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Whether perplexities and predictions are computed one decoder layer at a time, so that no
    whole model is in memory: if the models do not fit into memory (`auto`), `always` or `never`."""
    generations: Generations = Generations()
    """Prompts that both models continue, for a comparison side by side."""
    baselines: list[Baseline] = ["int8", "int4-g64"]
    """Simple compressions of the same layers whose perplexity is measured for comparison: integers
    by round-to-nearest (`int8`, `int4-g64` with one scale per 64 numbers, `int3-g64-asymmetric`
    with zero points), or the largest entries in as many bytes as the result (`sparse`). `[]`
    measures none."""

    @model_validator(mode="after")
    def _no_repetitions(self) -> "Evaluate":
        if twice := repeated(self.baselines):
            raise ValueError(f"the 'baselines' must differ, got twice: {twice}; remove one")
        if twice := repeated([each.name for each in self.perplexity]):
            raise ValueError(
                f"the names of the 'perplexity' entries must differ, got twice: {twice}; give one "
                "of each pair another 'name'"
            )
        if not self.dense and (self.generations.prompts or self.generations.file):
            raise ValueError(
                "'generations' compares with the dense model, but 'dense' is false; set 'dense' to "
                "true or remove 'generations'"
            )
        return self

    @property
    def scores_models(self) -> bool:
        """Whether each model is scored by itself."""
        return bool(self.perplexity or self.tasks.names or self.task)

    @property
    def compared_texts(self) -> list[Perplexity]:
        """The texts on which predictions of both models are compared."""
        return self.perplexity if self.dense and self.kl_tokens else []


class Stage(Strict):
    """One step of the pipeline: a mapping with one key, its kind, and the options under it."""

    # The source code of models that are made at run time is searched in all loaded modules, which
    # takes a second, and not found.
    model_config = ConfigDict(use_attribute_docstrings=False)

    @property
    def kind(self) -> str:
        """The key in `STAGES`."""
        return next(iter(type(self).model_fields))

    @property
    def options(self) -> Any:
        """The options of the stage."""
        return getattr(self, self.kind)


STAGES: dict[str, Any] = {
    "slice": Slice,
    "decompose": Decompose,
    "quantize": Annotated[Quantize, Field(description="Store weights as integers.")],
    "heal": Heal,
}
"""Kind of a stage -> its options, in the order of the pipeline."""


def _stage_model(kind: str, options: Any) -> type[Stage]:
    key: Any = {kind: (options, ...)}
    name, doc = f"{kind.capitalize()}Stage", f"A '{kind}' stage."
    return create_model(name, __base__=Stage, __doc__=doc, **key)


STAGE_MODELS = {kind: _stage_model(kind, options) for kind, options in STAGES.items()}
if TYPE_CHECKING:
    AnyStage = Stage
else:
    AnyStage = Union[tuple(STAGE_MODELS.values())]  # noqa: UP007  of as many as the table has


class Recipe(Strict):
    """One run: a model, calibration text, the stages in order, and an evaluation."""

    model: Model
    """The model to compress."""
    calibration: Calibration = Calibration()
    """The calibration text."""
    stages: Annotated[list[AnyStage], Field(min_length=1)]
    """What is done to the model, in order."""
    evaluate: Evaluate = Evaluate()
    """How the dense and the compressed model are compared."""
    output: Text
    """Folder for checkpoint and report."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random choices; the same seed on the same machine gives the same bytes."""

    @model_validator(mode="after")
    def _stages_in_order(self) -> "Recipe":
        order = list(STAGES)
        for index, (before, after) in enumerate(pairwise(self.stages), start=1):
            if order.index(after.kind) < order.index(before.kind):
                raise ValueError(
                    f"every '{after.kind}' must come before every '{before.kind}', got "
                    f"stages[{index}] after one; move it to the front"
                )
        return self

    @model_validator(mode="after")
    def _one_table_of_times(self) -> "Recipe":
        timed = {
            index: (options.rows, options.latency_table)
            for index, options in self.stages_of("decompose").items()
            if options.measure == "latency"
        }
        if len(set(timed.values())) > 1:
            stages = " and ".join(f"stages[{index}]" for index in timed)
            raise ValueError(
                f"{stages} must have the same 'rows' and 'latency_table', because one table gives "
                "the times of all of them; make them equal"
            )
        return self

    def stages_of(self, kind: str) -> dict[int, Any]:
        """Return the options of the stages of one kind by their index, in order."""
        return {i: stage.options for i, stage in enumerate(self.stages) if stage.kind == kind}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, short forms included."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "lrc recipe",
    }
