"""The source `python-docs`: the topics of `help()`, English prose that comes with every Python.

Topics quote each other at length, so repeated paragraphs are dropped before the topics are split;
otherwise a model would be evaluated on text that it was calibrated on.
"""

import re
from functools import cache
from typing import Literal

from lrc.configs.errors import DataError

CALIBRATION_FRACTION = 0.65  # the rest, about 30,000 tokens, still makes a dozen windows of 2,048


@cache
def python_docs(part: Literal["calibration", "evaluation"]) -> tuple[str, ...]:
    """Return the topics of one part, sorted by name; deterministic for one Python version.

    Raises
    ------
    DataError
        If this Python was installed without its help topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "source 'python-docs': this Python was installed without its help topics"
            " (pydoc_data); give a local .jsonl or .txt file"
        ) from error
    documents = without_repeats(dict(sorted(topics.items())))
    calibration = _calibration_topics({name: len(text) for name, text in documents.items()})
    return tuple(
        text for name, text in documents.items() if (name in calibration) == (part == "calibration")
    )


def paragraphs(text: str) -> list[str]:
    """Split at blank lines, keeping the indentation of every paragraph."""
    return [p.strip("\n") for p in re.split(r"\n[ \t]*\n", text) if p.strip()]


def without_repeats(documents: dict[str, str]) -> dict[str, str]:
    """Drop repeated paragraphs, within and between documents, and documents with nothing left.

    Paragraphs that differ only in white space count as equal.
    """
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name, text in documents.items():
        fresh = []
        for paragraph in paragraphs(text):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            kept[name] = "\n\n".join(fresh)
    return kept


def _calibration_topics(sizes: dict[str, int]) -> set[str]:
    """Return the calibration topics: each, largest first, goes to the part below its share."""
    chosen: set[str] = set()
    calibration = evaluation = 0
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if calibration / CALIBRATION_FRACTION <= evaluation / (1 - CALIBRATION_FRACTION):
            chosen.add(name)
            calibration += sizes[name]
        else:
            evaluation += sizes[name]
    return chosen
