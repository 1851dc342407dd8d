"""Documents -> text -> tokens -> windows, for calibration and perplexity."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.compressors.corpus.answers import answer_tokens, evenly_kept
from lrc.compressors.corpus.chat import Document, Renderer, chat_renderer
from lrc.compressors.corpus.documents import SOURCES, read_documents
from lrc.compressors.corpus.excerpts import TextHash, excerpts, joined, measured
from lrc.compressors.corpus.tokens import default_bos, tokenize
from lrc.configs.errors import DataError
from lrc.configs.recipe import Calibration, Perplexity
from lrc.configs.sources import described, fractions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 12
"""How much of a long text to read: English has about four characters per token, and random windows
should come from about three times the text that they cover."""
WHOLE_CHARACTERS = 2**22
"""Shorter texts are read whole for calibration: tokenizing them takes seconds."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and their source."""

    tokens: Tensor
    """Shape [n, length], int64, on the CPU; `length` includes the BOS token if there is one."""
    source: str
    """Name or path of the text, as in the recipe."""
    sha256: str | None
    """Of the whole text in UTF-8, before a chat template."""
    bos: bool
    """Whether every window starts with the tokenizer's BOS token."""
    text_tokens: int
    """Number of tokens of the text that was tokenized."""
    counted: Tensor | None = None
    """Which tokens count in the loss, [n, length]; None for all."""


def random_windows(
    ids: Tensor,
    *,
    samples: int,
    length: int,
    generator: torch.Generator,
    bos: int | None,
    fraction: float = 1.0,
) -> Tensor:
    """Draw windows [samples, length] (int64) that start anywhere in the text `ids` [n_tokens].

    With `bos` as the first token, a window has one text token less. `generator`, on the CPU, is
    used for one draw: `torch.randint(0, n_tokens - length, (samples,))`. `fraction` is that of all
    windows; errors name the number of these.

    Raises
    ------
    DataError
        If the text holds fewer than `samples * length` tokens.
    """
    starts = _random_starts(
        ids.numel(), samples=samples, length=length, generator=generator, fraction=fraction
    )
    return _windows_at(ids, starts, length, bos)


def _random_starts(
    n_tokens: int, *, samples: int, length: int, generator: torch.Generator, fraction: float
) -> Tensor:
    wanted = samples * length
    if n_tokens < wanted:
        key, at_most = "samples", int(n_tokens // length / fraction)
        if not at_most:
            key, at_most = "length", n_tokens
        raise DataError(
            f"calibration text holds {n_tokens:,} tokens, samples x length needs"
            f" {samples:,} x {length:,} = {wanted:,}; lower calibration.{key} to at most {at_most}"
            " or give more text"
        )
    # max: a text of exactly one window has one start, which randint's open end would leave out
    return torch.randint(0, max(1, n_tokens - length), (samples,), generator=generator)


def _windows_at(ids: Tensor, starts: Tensor, length: int, bos: int | None) -> Tensor:
    windows = ids[starts[:, None] + torch.arange(length)]  # [samples, length]
    return windows if bos is None else with_bos(windows[:, :-1], bos)


def disjoint_windows(ids: Tensor, *, window: int, limit: int | None, bos: int | None) -> Tensor:
    """Cut the text `ids` [n_tokens] into at most `limit` windows from its start.

    Returns [n, window] or, with `bos` before every window so that all of its text tokens are
    predicted, [n, window + 1], in int64. The last incomplete window is dropped.
    """
    count = ids.numel() // window
    if not count:
        raise DataError(
            f"evaluation text holds {ids.numel():,} tokens, fewer than one window of {window:,};"
            f" lower the window to at most {ids.numel():,} or give more text"
        )
    windows = ids[: count * window].view(count, window)[:limit]
    return windows.clone() if bos is None else with_bos(windows, bos)


def with_bos(windows: Tensor, bos: int) -> Tensor:
    """Return windows [n, length] with a BOS token before each."""
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of a text, or of evenly spaced excerpts of a long one."""

    ids: Tensor
    """[n_tokens], int64."""
    sha256: str
    """Of the whole text in UTF-8, before a chat template."""
    counted: Tensor | None = None
    """Which tokens count in the loss, [n_tokens]; None for all."""


def calibration_windows(
    calibration: Calibration,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    generator: torch.Generator,
    fraction: float = 1.0,
) -> Windows:
    """Read a calibration text, which has a single source, and draw its windows.

    Source `self` is sampled from the model and not handled here. `fraction` is that of all windows
    of the recipe.
    """
    text, bos = calibration_text(calibration, tokenizer), default_bos(tokenizer)
    length, n_tokens = calibration.length, text.ids.numel()
    starts = _random_starts(
        n_tokens,
        samples=calibration.samples,
        length=length,
        generator=generator,
        fraction=fraction,
    )
    tokens, counted = _windows_at(text.ids, starts, length, bos), None
    if text.counted is not None:
        # No position predicts the BOS token.
        counted = _windows_at(text.counted, starts, length, None if bos is None else False)
    source = described(calibration.source)
    return Windows(tokens, source, text.sha256, bos is not None, n_tokens, counted)


def calibration_text(
    calibration: Calibration, tokenizer: "PreTrainedTokenizerBase", *, key: str | None = None
) -> Text:
    """Read and tokenize a calibration text, which has a single source.

    Errors name the `key` of the source in the recipe.

    A file longer than `WHOLE_CHARACTERS`, and than `CHARACTERS_PER_TOKEN` for every token of the
    windows, is not tokenized whole, but only as many evenly spaced excerpts as there are windows.
    With ``loss: answers`` they are whole documents.
    """
    samples, length = calibration.samples, calibration.length
    (source,) = fractions(calibration.source)
    wanted = samples * length
    characters = wanted * CHARACTERS_PER_TOKEN
    render: Renderer = chat_renderer(tokenizer) if calibration.chat_template else str
    read = partial(
        read_documents,
        source,
        part="calibration",
        field=calibration.field,
        chat=calibration.chat_template,
        characters=characters,
        key=key,
    )
    if calibration.loss == "answers":
        text_hash = TextHash()
        limit = max(characters, WHOLE_CHARACTERS)
        kept = evenly_kept(text_hash.reading(read()), measured, limit)
        ids, counted = answer_tokens(kept, render, tokenizer)
        return Text(ids, text_hash.hexdigest(), counted)
    whole = source in SOURCES  # of known size, and drawn from as in the papers
    total, text_hash = 0, TextHash()
    documents: list[Document] = []
    for document in text_hash.reading(read()):
        total += measured(document)
        if whole or total <= max(characters, WHOLE_CHARACTERS):
            documents.append(document)
        else:
            documents.clear()
    while True:
        texts = (
            (text for text in map(render, documents) if text is not None)
            if documents
            else excerpts(read(), render, total=total, count=samples, characters=characters)
        )
        ids = tokenize(joined(texts), tokenizer)
        if documents or len(ids) >= wanted or characters >= total:
            return Text(ids, text_hash.hexdigest())
        characters = min(4 * characters, total)  # of a tokenizer with very long tokens


def evaluation_windows(spec: Perplexity, tokenizer: "PreTrainedTokenizerBase") -> Windows:
    """Read the text of a perplexity and cut it into disjoint windows.

    No more of it is tokenized than the windows need.
    """
    text_hash = TextHash()
    documents = text_hash.reading(read_documents(spec.source, part="evaluation", field=spec.field))
    texts = (str(document) for document in documents)  # none is a conversation
    limits = [spec.tokens, spec.windows and spec.windows * spec.window]
    limit = min(filter(None, limits), default=None)
    ids, bos = tokenize(joined(texts), tokenizer, limit=limit), default_bos(tokenizer)
    for _ in texts:  # the rest is checked and hashed
        pass
    try:
        tokens = disjoint_windows(ids, window=spec.window, limit=spec.windows, bos=bos)
    except DataError as error:
        raise DataError(f"evaluate.perplexity {spec.name}: {error}") from error
    return Windows(tokens, spec.source, text_hash.hexdigest(), bos is not None, ids.numel())
