"""Data sets of the Hugging Face Hub that have a short name in a recipe."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from lrc.configs.errors import DataError


@dataclass(frozen=True)
class HubPart:
    """Where one part of a data set lies."""

    split: str
    file: str | None = None
    """One data file, read row by row: the rest of a large data set is never downloaded."""
    rows: int | None = None
    """Use only the first so many rows."""


@dataclass(frozen=True)
class HubSource:
    """A row of the table of named data sets."""

    path: str
    config: str | None
    column: str
    calibration: HubPart
    evaluation: HubPart


HUB_SOURCES: dict[str, HubSource] = {
    "wikitext2": HubSource(
        path="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        column="text",
        calibration=HubPart("train"),
        evaluation=HubPart("test"),
    ),
    # The first 1,100 validation rows are what GPTQ and its successors take from C4.
    "c4": HubSource(
        path="allenai/c4",
        config=None,  # 'en' would list 1,024 files first; the file's own name says it
        column="text",
        calibration=HubPart("train", file="en/c4-train.00000-of-01024.json.gz"),
        evaluation=HubPart("validation", file="en/c4-validation.00000-of-00008.json.gz", rows=1100),
    ),
}


def read_hub(
    name: str, *, part: Literal["calibration", "evaluation"], characters: int | None = None
) -> list[str]:
    """Read the rows of a named data set.

    Parameters
    ----------
    name : str
        A key of `HUB_SOURCES`.
    part : {"calibration", "evaluation"}
        Which of the two disjoint parts.
    characters : int, optional
        Where rows are read one by one, stop after so many characters.

    Raises
    ------
    DataError
        If the data set can be had neither from the Hub nor from the local cache.
    """
    import datasets

    source = HUB_SOURCES[name]
    place: HubPart = getattr(source, part)
    # Reading row by row needs the network; offline, the cache holds whole files only.
    stream = place.file is not None and not datasets.config.HF_HUB_OFFLINE
    try:
        with quiet_datasets():
            rows = datasets.load_dataset(
                source.path,
                source.config,
                data_files=None if place.file is None else {place.split: place.file},
                split=place.split,
                streaming=stream,
            )
            return _take(rows, source.column, place.rows, characters if place.file else None)
    except Exception as error:  # datasets, httpx and fsspec share no base class
        reason = " ".join(str(error).split())
        raise DataError(
            f"source '{name}': cannot read {source.path} from the Hugging Face Hub"
            f" ({type(error).__name__}: {reason}); give a local .jsonl or .txt file as source,"
            " or set HF_HUB_OFFLINE=1 where the Hub cache already holds it"
        ) from error


def _take(
    rows: Iterable[dict[str, Any]], column: str, count: int | None, characters: int | None
) -> list[str]:
    """Take rows until one of the two limits is reached."""
    texts: list[str] = []
    total = 0
    for row in rows:
        texts.append(row[column])
        total += len(row[column])
        if len(texts) == count or (characters is not None and total >= characters):
            break
    return texts


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn the progress bars of `datasets` off, and on again if they were."""
    import datasets

    drawn = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            datasets.enable_progress_bars()
