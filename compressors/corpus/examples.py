"""Read tables of example texts with labels: local files, or data sets of the Hub."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from lrc.compressors.corpus.chat import check_unicode, shown
from lrc.compressors.corpus.hub import quiet_datasets
from lrc.compressors.io.fingerprint import sha256
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.task_data import TaskData

SUFFIXES = (".jsonl", ".csv", ".parquet")
SPLITS = {"calibration": "train", "evaluation": "validation"}
Row = Mapping[str, Any]
Part = Literal["calibration", "evaluation"]
KEYS: dict[Part, str] = {"calibration": "calibration.task", "evaluation": "evaluate.task"}


@dataclass(frozen=True)
class Examples:
    """Texts of a task, in the order of the table."""

    texts: list[tuple[str, ...]]
    """One text, or a pair of them, of every example."""
    labels: list[int] | None
    """Classes; None if the table has no labels."""


def check_task_data(spec: TaskData, part: Part) -> None:
    """Check that the table exists; raises `RecipeError`."""
    key, path = KEYS[part], Path(spec.data).expanduser()
    if path.is_dir():
        raise RecipeError([f"{key}.data: {spec.data} is a folder; give a file in it"])
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise RecipeError([f"{key}.data: no such file: {spec.data}; check the path"])
        given = [name for name in ("config", "split") if getattr(spec, name) is not None]
        if given:
            raise RecipeError(
                [f"{key}.{given[0]}: is for data sets of the Hub, got a file; remove the key"]
            )
    elif path.exists() or spec.data.count("/") != 1 or path.suffix:
        raise RecipeError(
            [
                f"{key}.data: must be the path of a {', '.join(SUFFIXES)} file, or a data set of "
                f"the Hub (org/name), got '{spec.data}'"
            ]
        )


def task_identity(spec: TaskData) -> str:
    """Return the name of a data set of the Hub, or what identifies the content of a file."""
    path = Path(spec.data).expanduser()
    return f"{path.suffix.lower()} {sha256(path)}" if path.is_file() else spec.data


def read_examples(
    spec: TaskData,
    part: Part,
    *,
    classes: Mapping[int, str] | None = None,
    limit: int | None = None,
) -> Examples:
    """Read the examples of a table, at most the first `limit`.

    Parameters
    ----------
    spec : TaskData
    part : {"calibration", "evaluation"}
        For which the recipe has the table.
    classes : mapping of int to str, optional
        Names of the classes of the model. Without them labels are not read.

    Raises
    ------
    RecipeError
        If the table does not exist.
    DataError
        If it is empty or malformed, lacks a column, or has labels that are no class.
    """
    check_task_data(spec, part)
    key = KEYS[part]
    numbers = {} if classes is None else {name: number for number, name in classes.items()}
    texts: list[tuple[str, ...]] = []
    labels: list[int] = []
    for where, row in islice(_rows(spec, part, key), limit):
        texts.append(tuple(_text(row, column, where, key) for column in spec.columns))
        if classes is not None and spec.label is not None:
            labels.append(_class(_value(row, spec.label, where, f"{key}.label"), numbers, where))
    if not texts:
        raise DataError(f"{key}.data {spec.data}: has no rows; give a table with some")
    return Examples(texts, labels or None)


def drawn_examples(
    spec: TaskData, samples: int, *, seed: int, classes: Mapping[int, str] | None = None
) -> Examples:
    """Read the examples of a calibration table, and draw some of them at random.

    Raises as `read_examples`, and `DataError` if there are too few. For `classes`, see there.
    """
    found = read_examples(spec, "calibration", classes=classes)
    if len(found.texts) < samples:
        raise DataError(
            f"calibration.task.data {spec.data}: has {len(found.texts):,} examples, "
            f"calibration.samples needs {samples:,}; lower it"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(found.texts), generator=generator)[:samples].tolist()
    labels = None if found.labels is None else [found.labels[i] for i in chosen]
    return Examples([found.texts[i] for i in chosen], labels)


def _rows(spec: TaskData, part: Part, key: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a table, each with the words that name it in an error."""
    path = Path(spec.data).expanduser()
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    where = f"{key}.data {spec.data}"
    read = readers.get(path.suffix.lower())
    if read is None:
        yield from _numbered(_hub(spec, spec.split or SPLITS[part], where), where)
        return
    try:
        yield from read(path, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: must be UTF-8 text; convert it to UTF-8") from error


def _numbered(rows: Iterable[Row], where: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, 1):
        yield f"{where}, row {number}", row


def _json_lines(path: Path, where: str) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            here = f"{where}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{here}: must be one JSON object, got {shown(line)}") from error
            if not isinstance(row, dict):
                raise DataError(f"{here}: must be a JSON object, got {shown(line)}")
            yield here, row


def _csv(path: Path, where: str) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for here, row in _numbered(csv.DictReader(file, strict=True), where):
                if None in row or None in row.values():
                    raise DataError(f"{here}: must have as many fields as the first line")
                yield here, row
        except csv.Error as error:
            raise DataError(f"{where}: is not valid CSV ({error})") from error


def _parquet(path: Path, where: str) -> Iterator[tuple[str, Row]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(rows, where)
    except ArrowException as error:
        raise DataError(f"{where}: is not a valid Parquet file ({error})") from error


def _hub(spec: TaskData, split: str, where: str) -> Iterator[Row]:
    import datasets

    try:
        with quiet_datasets():
            yield from datasets.load_dataset(spec.data, spec.config, split=split)
    except Exception as error:  # datasets, httpx and fsspec share no base class
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{where}: cannot read split '{split}' from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check 'data', 'config' and 'split', or give a "
            "local file"
        ) from error


def _value(row: Row, column: str, where: str, key: str) -> Any:
    if column not in row:
        names: Sequence[str] = [repr(name) for name in row]
        raise DataError(
            f"{where}: no column '{column}', which {key} names; got {', '.join(names) or 'none'}"
        )
    return row[column]


def _text(row: Row, column: str, where: str, key: str) -> str:
    value = _value(row, column, where, f"{key}.text")
    if not isinstance(value, str):
        raise DataError(f"{where}: '{column}' must be a string, got {shown(value)}")
    return check_unicode(value, f"{where}: '{column}'")


def _class(value: Any, numbers: Mapping[str, int], where: str) -> int:
    """Return the number of the class that a label names."""
    found = numbers.get(value) if isinstance(value, str) else value
    if isinstance(value, str) and found is None and value.strip().isdecimal():
        found = int(value)  # of a CSV file
    if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(numbers):
        return found
    names = ", ".join(f"{number} ({name})" for name, number in numbers.items())
    raise DataError(
        f"{where}: the label must be a class of the model, which are {names}, got {shown(value)}"
    )
