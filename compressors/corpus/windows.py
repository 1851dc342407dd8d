"""Documents -> text -> tokens -> windows, for calibration and perplexity."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrc.compressors.corpus.documents import Document, read_documents
from lrc.configs.errors import DataError
from lrc.configs.recipe import Calibration, Perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
"""Between two documents, as in the perplexity of GPTQ, SliceGPT and SVD-LLM."""
STREAMED_CHARACTERS_PER_TOKEN = 12
"""How much of a streamed source to read: English has about four characters per token, and random
windows should come from about three times the text that they cover."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and their source."""

    tokens: Tensor
    """Shape [n, length], int64, on the CPU; `length` includes the BOS token if there is one."""
    source: str
    """Name or path of the text, as in the recipe."""
    sha256: str | None
    """Of the whole text as tokenized, in UTF-8."""
    bos: bool
    """Whether every window starts with the tokenizer's BOS token."""
    text_tokens: int
    """Number of tokens of the whole text."""


def join_documents(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, chat_template: bool
) -> str:
    """Join documents by a blank line.

    With `chat_template` every document is first rendered by the tokenizer's template; plain text
    becomes one user turn, and blank text is dropped.

    Raises
    ------
    DataError
        If the tokenizer has no chat template, or the template refuses a conversation.
    """
    if not chat_template:
        return SEPARATOR.join(d for d in documents if isinstance(d, str))
    if not tokenizer.chat_template:
        raise DataError(
            f"calibration.chat_template: the tokenizer ({tokenizer.name_or_path or 'unnamed'}) has"
            " no chat template; set chat_template: false or name the tokenizer of an instruct"
            " model under model.tokenizer"
        )
    rendered = []
    for number, document in enumerate(documents, 1):
        if isinstance(document, str):
            if not document.strip():
                continue
            document = [{"role": "user", "content": document}]
        try:
            rendered.append(str(tokenizer.apply_chat_template(document, tokenize=False)))
        except Exception as error:  # jinja2 errors, and whatever a template raises itself
            raise DataError(
                f"calibration.chat_template: the tokenizer's template refuses document {number}:"
                f" {error}; repair its messages or set chat_template: false"
            ) from error
    return SEPARATOR.join(rendered)


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Return the tokens [n_tokens] (int64) of a text, without special tokens."""
    # verbose=False: no warning about the length, as the text is cut into windows
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def default_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the BOS token if the tokenizer adds it by default.

    Tried on a text, because no attribute tells whether a post-processor adds it.
    """
    probe = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and probe and probe[0] == bos else None


def check_vocabulary(tokens: Tensor, embedding: Any) -> None:
    """Raise `DataError` for tokens that a model's embedding has no row for."""
    rows, largest = getattr(embedding, "num_embeddings", None), int(tokens.max())
    if isinstance(rows, int) and largest >= rows:  # on a GPU an index error kills the process
        raise DataError(
            f"model.tokenizer: the tokenizer gives token {largest}, the model has {rows} tokens;"
            " use the tokenizer that belongs to the model"
        )


def random_windows(
    ids: Tensor, *, samples: int, length: int, generator: torch.Generator, bos: int | None
) -> Tensor:
    """Draw windows [samples, length] (int64) that start anywhere in the text `ids` [n_tokens].

    With `bos` as the first token, a window has one text token less. `generator`, on the CPU, is
    used for one draw: `torch.randint(0, n_tokens - length, (samples,))`.

    Raises
    ------
    DataError
        If the text holds fewer than `samples * length` tokens.
    """
    n_tokens, wanted = ids.numel(), samples * length
    if n_tokens < wanted:
        key, at_most = "samples", n_tokens // length
        if not at_most:
            key, at_most = "length", n_tokens
        raise DataError(
            f"calibration text holds {n_tokens:,} tokens, samples x length needs"
            f" {samples:,} x {length:,} = {wanted:,}; lower calibration.{key} to at most {at_most}"
            " or give more text"
        )
    # max: a text of exactly one window has one start, which randint's open end would leave out
    starts = torch.randint(0, max(1, n_tokens - length), (samples,), generator=generator)
    windows = ids[starts[:, None] + torch.arange(length)]  # [samples, length]
    return windows if bos is None else _with_bos(windows[:, :-1], bos)


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
    return windows.clone() if bos is None else _with_bos(windows, bos)


def _with_bos(windows: Tensor, bos: int) -> Tensor:
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def calibration_windows(
    calibration: Calibration, tokenizer: "PreTrainedTokenizerBase", *, generator: torch.Generator
) -> Windows:
    """Read the calibration text of a recipe and draw its windows.

    Source `self` is sampled from the model and not handled here.
    """
    samples, length = calibration.samples, calibration.length
    documents = read_documents(
        calibration.source,
        part="calibration",
        field=calibration.field,
        chat=calibration.chat_template,
        characters=samples * length * STREAMED_CHARACTERS_PER_TOKEN,
    )
    text = join_documents(documents, tokenizer, chat_template=calibration.chat_template)
    ids, bos = tokenize(text, tokenizer), default_bos(tokenizer)
    tokens = random_windows(ids, samples=samples, length=length, generator=generator, bos=bos)
    return Windows(tokens, calibration.source, _sha256(text), bos is not None, ids.numel())


def evaluation_windows(spec: Perplexity, tokenizer: "PreTrainedTokenizerBase") -> Windows:
    """Read the text of a perplexity and cut it into disjoint windows."""
    documents = read_documents(spec.source, part="evaluation", field=spec.field)
    text = join_documents(documents, tokenizer, chat_template=False)
    ids, bos = tokenize(text, tokenizer), default_bos(tokenizer)
    try:
        tokens = disjoint_windows(
            ids[: spec.tokens], window=spec.window, limit=spec.windows, bos=bos
        )
    except DataError as error:
        raise DataError(f"evaluate.perplexity {spec.name}: {error}") from error
    return Windows(tokens, spec.source, _sha256(text), bos is not None, ids.numel())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
