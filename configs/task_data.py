"""Tables of example texts, with labels or without: for encoders."""

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
    """The column of the labels: numbers of the classes of the model, or their names."""
    length: PositiveInt = 256
    """Tokens per example; longer texts are cut."""

    @property
    def columns(self) -> list[str]:
        """The columns of the texts."""
        return [self.text] if isinstance(self.text, str) else self.text


class CalibrationTask(TaskData):
    """Examples of the task of an encoder, over which statistics are computed."""


class EvaluationTask(TaskData):
    """Examples on which an encoder is evaluated.

    Measured are the accuracy, if there are labels, and the cosine similarity of the mean-pooled
    embeddings of the compressed and the dense model.
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
