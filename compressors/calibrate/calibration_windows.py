"""The calibration windows of a run: from a text or sampled from the model, kept in the journal."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.corpus.tokens import check_vocabulary, default_bos
from lrc.compressors.corpus.windows import Windows, calibration_windows
from lrc.compressors.io.journal import Journal
from lrc.configs.errors import DataError
from lrc.configs.recipe import Calibration
from lrc.configs.sources import counts, described

FILE = "windows.safetensors"
SELF = "self"
"""The source that is sampled from the model."""
LITTLE_VOCABULARY = 0.02
"""Fraction of the vocabulary below which there is a warning. 8,192 tokens of ``python-docs`` have
2.9 % of a vocabulary of 49,152, and 32,768 have 6.3 %."""


def take_windows(
    calibration: Calibration,
    tokenizer: Any,
    journal: Journal,
    *,
    seed: int,
    embedding: Any,
    sample: Callable[[tuple[int, int], torch.Generator], Tensor],
) -> Tensor:
    """Return the windows [samples, length] that statistics are collected on.

    The model's `embedding` must have a row for every token. `sample` returns windows of a shape
    that the model writes itself; it is called only for the source ``self``.
    """
    if not journal.has(FILE):
        generator = torch.Generator().manual_seed(seed)
        bos = default_bos(tokenizer)
        found = []
        for source, samples in counts(calibration.source, calibration.samples).items():
            if source == SELF:
                sampled = sample((samples, calibration.length), generator)
                found.append(Windows(sampled, SELF, None, bos is not None, sampled.numel()))
                continue
            part = calibration.of(source, samples)
            fraction = samples / calibration.samples
            found.append(
                calibration_windows(part, tokenizer, generator=generator, fraction=fraction)
            )
        tokens = torch.cat([windows.tokens for windows in found])
        counted = torch.cat([_counted(windows) for windows in found])
        if len(found) > 1:  # the first windows are then of all sources, too
            order = torch.randperm(len(tokens), generator=generator)
            tokens, counted = tokens[order], counted[order]
        check_vocabulary(tokens, embedding)
        facts = {
            **_facts(found, described(calibration.source)),
            "bos": bos is not None,
            "tokens": tokens.numel(),
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "vocabulary": {
                "used": tokens.unique().numel(),
                "size": embedding.weight.shape[0],
            },
        }
        tensors = {"tokens": tokens}
        if calibration.loss == "answers":
            facts["loss_tokens"] = _loss_tokens(counted)
            tensors["counted"] = counted
        journal.write_tensors(FILE, tensors, {"facts": facts})
    return journal.read_tensor(FILE, "tokens")


def _counted(windows: Windows) -> Tensor:
    found = windows.counted
    return torch.ones_like(windows.tokens, dtype=torch.bool) if found is None else found


def _loss_tokens(counted: Tensor) -> int:
    """Return the number of tokens in the loss; refuse a text without any."""
    if not bool(counted.any()):
        raise DataError(
            "calibration.loss: answers needs windows with an assistant's message, got none; give "
            "other conversations or more 'samples', or set loss: all"
        )
    return int(counted.sum())


def counted_tokens(journal: Journal) -> Tensor | None:
    """Return which tokens of the windows count in the loss [samples, length]; None for all."""
    if "loss_tokens" not in (provenance(journal) or {}):
        return None
    return journal.read_tensor(FILE, "counted")


def _facts(found: list[Windows], source: str) -> dict[str, Any]:
    """Return the origin of windows; of several sources, also that of each."""
    texts = [
        {"source": each.source, "text_sha256": each.sha256, "text_tokens": each.text_tokens}
        for each in found
    ]
    if len(texts) == 1:
        return texts[0]
    n_tokens = sum(each.text_tokens for each in found)
    return {
        "source": source,
        "text_sha256": None,
        "text_tokens": n_tokens,
        "texts": [
            {**text, "tokens": each.tokens.numel()} for text, each in zip(texts, found, strict=True)
        ],
    }


def vocabulary_warning(facts: Mapping[str, Any] | None) -> str | None:
    """Return a warning if the windows contain little of the vocabulary; None if not, or unknown.

    Parameters
    ----------
    facts : mapping or None
        From `provenance`.
    """
    found = (facts or {}).get("vocabulary")  # journals of earlier versions have none
    if found is None or found["used"] >= LITTLE_VOCABULARY * found["size"]:
        return None
    return (
        f"calibration: the text has {found['used']:,} of the {found['size']:,} tokens of the "
        f"vocabulary ({found['used'] / found['size']:.1%}), and nothing is known about the others; "
        "use more or more varied text, such as several sources"
    )


def provenance(journal: Journal) -> dict[str, Any] | None:
    """Return the source of the windows, for the report; None if none were needed."""
    if not journal.has(FILE):
        return None
    facts: dict[str, Any] = journal.read_facts(FILE)["facts"]
    return facts
