"""Data sets of the Hugging Face Hub that have a short name in a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from lrc.configs.errors import DataError

COLUMN = "text"


@dataclass(frozen=True)
class HubPart:
    """One part of a data set."""

    path: str
    split: str
    config: str | None = None
    file: str | None = None
    """One data file, streamed: the rest of a large data set is never downloaded."""
    rows: int | None = None
    """Use only the first rows."""


HUB_SOURCES: dict[str, dict[Literal["calibration", "evaluation"], HubPart]] = {
    "wikitext2": {
        "calibration": HubPart("Salesforce/wikitext", "train", "wikitext-2-raw-v1"),
        "evaluation": HubPart("Salesforce/wikitext", "test", "wikitext-2-raw-v1"),
    },
    # The first 1,100 validation rows are those that GPTQ and its successors use. The config 'en'
    # would first list 1,024 files.
    "c4": {
        "calibration": HubPart("allenai/c4", "train", file="en/c4-train.00000-of-01024.json.gz"),
        "evaluation": HubPart(
            "allenai/c4", "validation", file="en/c4-validation.00000-of-00008.json.gz", rows=1100
        ),
    },
}


def read_hub(
    name: str, *, part: Literal["calibration", "evaluation"], characters: int | None = None
) -> Iterator[str]:
    """Read the rows of one of the two disjoint parts of a named data set.

    Stops after `characters` if rows are streamed.

    Raises
    ------
    DataError
        If the data set is neither on the Hub nor in the local cache.
    """
    source = HUB_SOURCES[name][part]
    enough = characters if source.file is not None else None
    total = 0
    for row in islice(_rows(name, source), source.rows):
        yield row[COLUMN]
        total += len(row[COLUMN])
        if enough is not None and total >= enough:
            return


def _rows(name: str, source: HubPart) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        with quiet_datasets():
            yield from datasets.load_dataset(
                source.path,
                source.config,
                data_files=None if source.file is None else {source.split: source.file},
                split=source.split,
                # Streaming needs the network; offline, the cache holds whole files only.
                streaming=source.file is not None and not datasets.config.HF_HUB_OFFLINE,
            )
    except Exception as error:  # datasets, httpx and fsspec share no base class
        reason = " ".join(str(error).split())
        raise DataError(
            f"source '{name}': cannot read {source.path} from the Hugging Face Hub"
            f" ({type(error).__name__}: {reason}); give a local .jsonl or .txt file as source,"
            " or set HF_HUB_OFFLINE=1 where the Hub cache already holds it"
        ) from error


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn off the progress bars of `datasets` inside the context."""
    import datasets

    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
