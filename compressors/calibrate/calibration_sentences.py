"""The calibration texts of an encoder: examples of a task or pieces of a text, in the journal."""

import hashlib
from functools import partial
from typing import Any

from lrc.compressors.calibrate.calibration_windows import FILE
from lrc.compressors.corpus.documents import read_documents
from lrc.compressors.corpus.examples import drawn_examples, task_identity
from lrc.compressors.corpus.excerpts import TextHash, excerpts, measured
from lrc.compressors.corpus.sentences import Sentences, tokenize_sentences
from lrc.compressors.corpus.tokens import check_vocabulary
from lrc.compressors.corpus.windows import CHARACTERS_PER_TOKEN
from lrc.compressors.io.journal import Journal
from lrc.configs.errors import DataError
from lrc.configs.recipe import Calibration
from lrc.configs.sources import counts, described

STORED = ("tokens", "mask", "segments", "labels")
"""Parts of `Sentences`, by their names in the journal."""


def take_sentences(
    calibration: Calibration,
    tokenizer: Any,
    journal: Journal,
    *,
    seed: int,
    embedding: Any,
    classes: dict[int, str] | None,
) -> Sentences:
    """Return the texts that statistics of an encoder are collected on.

    Examples of a task are drawn at random; from a text, evenly spaced pieces are taken.

    Parameters
    ----------
    embedding : nn.Module
        Must have a row for every token.
    classes : dict of int to str, optional
        Names of the classes of a classifier.
    """
    if not journal.has(FILE):
        task = calibration.task
        if task is None:
            texts, text_hash = _pieces(calibration)
            labels, source = None, described(calibration.source)
        else:
            examples = drawn_examples(task, calibration.samples, seed=seed, classes=classes)
            texts, labels = examples.texts, examples.labels
            source, text_hash = task.data, task_identity(task).rpartition(" ")[2]
        found = tokenize_sentences(texts, tokenizer, length=calibration.window, labels=labels)
        check_vocabulary(found.tokens, embedding)
        tensors = {name: tensor for name, tensor in vars(found).items() if tensor is not None}
        facts = {
            "source": source,
            "text_sha256": text_hash,
            "text_tokens": found.n_tokens,
            "bos": False,
            "tokens": found.n_tokens,
            "tokens_sha256": hashlib.sha256(found.tokens.numpy().tobytes()).hexdigest(),
            "vocabulary": {
                "used": found.tokens[found.mask].unique().numel(),
                "size": embedding.weight.shape[0],
            },
        }
        journal.write_tensors(FILE, tensors, {"facts": facts})
    return Sentences(**journal.read_tensors(FILE, {name: name for name in STORED}))


def _pieces(calibration: Calibration) -> tuple[list[tuple[str, ...]], str]:
    """Return as many pieces of the calibration text as there are samples, and its hash."""
    length = calibration.length * CHARACTERS_PER_TOKEN
    text_hash, found = TextHash(), list[str]()
    for source, samples in counts(calibration.source, calibration.samples).items():
        characters = samples * length
        read = partial(
            read_documents,
            source,
            part="calibration",
            field=calibration.field,
            characters=characters,
        )
        total = sum(measured(document) for document in text_hash.reading(read()))
        parts = [
            text
            for text in excerpts(read(), str, total=total, count=samples, characters=characters)
            if text.strip()
        ]
        if len(parts) < samples:
            raise DataError(
                f"calibration.source {source}: gives {len(parts)} pieces of {length:,} "
                f"characters, {samples} are needed; lower calibration.samples or give more text"
            )
        found += [parts[i * len(parts) // samples] for i in range(samples)]
    return [(text,) for text in found], text_hash.hexdigest()
