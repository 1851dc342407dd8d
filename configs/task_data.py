"""Tables of example texts: for encoders, with labels or without, and encoder-decoder models."""

from pathlib import PureWindowsPath
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from lrc.configs.strict import Strict, Text


class TaskData(Strict):
    """A table with one example in every row."""

    data: Text
    """Path of a `.jsonl`, `.csv` or `.parquet` file, or a data set of the Hub (`org/name`)."""
    config: Text | None = None
    """Configuration of the data set on the Hub, if it has several."""
    split: Text | None = None
    """Split of the data set on the Hub; `train` for calibration and `validation` for evaluation if
    left out."""
    text: Text | Annotated[list[Text], Field(min_length=1, max_length=2)] = "text"
    """The column of the text, or a list of the two columns of a pair of texts."""
    label: Text | None = None
    """Of an encoder: the column of the labels: numbers of the classes of the model, or their
    names."""
    target: Text | None = None
    """Of an encoder-decoder model: the column of the text that the model is to write for that in
    the column `text`."""
    length: PositiveInt = 256
    """Tokens per text; longer texts are cut."""

    @property
    def columns(self) -> list[str]:
        """The columns of the texts; that of the target is the last."""
        texts = [self.text] if isinstance(self.text, str) else self.text
        return texts if self.target is None else [*texts, self.target]

    @property
    def tokens(self) -> int:
        """Tokens of an example, at most."""
        return self.length if self.target is None else 2 * self.length

    @model_validator(mode="after")
    def _either_label_or_target(self) -> "TaskData":
        if self.target is not None and (self.label is not None or len(self.columns) != 2):
            raise ValueError(
                "'target' needs one column of source texts and no 'label', got text: "
                f"{self.text!r} and label: {self.label!r}; remove 'label', and name one column "
                "in 'text'"
            )
        return self


class CalibrationTask(TaskData):
    """Examples of a task, over which statistics are computed."""


class EvaluationTask(TaskData):
    """Examples on which an encoder or an encoder-decoder model is evaluated.

    Measured are, of an encoder, the accuracy, if there are labels, and the cosine similarity of the
    mean-pooled embeddings of the compressed and the dense model; of an encoder-decoder model, the
    perplexity of the target texts.
    """

    name: str = ""
    """Name in the report; that of the data if left out."""
    samples: PositiveInt | None = None
    """Highest number of examples, from the first; all if left out."""
    batch_size: PositiveInt = 32
    """Examples that are scored together."""

    @model_validator(mode="after")
    def _default_name(self) -> "EvaluationTask":
        if not self.name:
            object.__setattr__(self, "name", PureWindowsPath(self.data).stem)  # / or \\
        return self
