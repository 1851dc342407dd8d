"""Whether a compressed model loses more on text unlike that which it was fitted to."""

from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import Any

from lrc.configs.recipe import Perplexity

GAP = 2
"""Factor between increases of the loss from which a warning is given. The increase of the demo's
result on C4 is 3.8 times that on other parts of the text that it was calibrated on."""
SMALLEST = 1.02
"""Ratio of perplexities below which no warning is given."""


def with_domains(
    perplexity: Mapping[str, Mapping[str, Any]],
    specs: Iterable[Perplexity],
    read: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Add `in_domain` to every entry of a report's perplexities.

    It is true if the text has the source or the hash of one that the compression read, and None if
    the compression read none.

    Parameters
    ----------
    perplexity : mapping
        From `compare`, by name of the text.
    specs : iterable of Perplexity
    read : sequence of mapping
        The texts that the compression read, with their `source` and `text_sha256`.
    """
    sources = {spec.name: spec.source for spec in specs}
    known_sources = {text["source"] for text in read}
    known_hashes = {text["text_sha256"] for text in read} - {None}
    return {
        name: {
            **entry,
            "in_domain": sources[name] in known_sources or entry["text_sha256"] in known_hashes
            if read
            else None,
        }
        for name, entry in perplexity.items()
    }


def texts_read(records: Iterable[Mapping[str, Any] | None]) -> list[Mapping[str, Any]]:
    """Return the single texts of records of calibration and training text."""
    return [text for record in records if record for text in record.get("texts") or [record]]


def domain_gap(perplexity: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return a sentence if the model loses much more on other text than on that in domain.

    That is, if the perplexity of one text out of domain rises by at least 2 %, and the logarithm of
    its ratio to the dense model is more than twice as large as on any text in domain. None
    otherwise, and without texts of both kinds.
    """
    ratios = {
        kind: {
            name: entry["ratio"]
            for name, entry in perplexity.items()
            if entry["in_domain"] is kind and entry["ratio"] is not None
        }
        for kind in (True, False)
    }
    if not ratios[True] or not ratios[False]:
        return None
    (inside, small), (outside, large) = (
        max(ratios[kind].items(), key=lambda item: item[1]) for kind in (True, False)
    )
    if large < SMALLEST or log(large) <= GAP * log(small):
        return None
    return (
        f"domain-gap: perplexity is {large:.3f} times that of the dense model on {outside}, but"
        f" {small:.3f} times on {inside}, which resembles the calibration text: on other text the"
        " model loses more. Calibrate on text of the intended use, or on several kinds, as with"
        " calibration.source: {c4: 0.5, self: 0.5}"
    )
