"""Which tokens of rendered conversations are answers: contents of the assistant's messages."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrc.compressors.corpus.chat import Conversation, Document, Renderer, shown
from lrc.compressors.corpus.documents import SEPARATOR
from lrc.configs.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
PROBE = "QXZQ"
Span = tuple[int, int]
"""First character and that after the last."""


def evenly_kept(
    documents: Iterable[Document], measure: Callable[[Document], int], limit: int
) -> list[Document]:
    """Return evenly spaced documents whose sizes sum to at most `limit`, or a single larger one.

    All documents are read. Every second of those that were kept is dropped whenever they become
    too many.
    """
    kept: list[Document] = []
    stride, total = 1, 0
    for number, document in enumerate(documents):
        if number % stride:
            continue
        kept.append(document)
        total += measure(document)
        while total > limit and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            total = sum(map(measure, kept))
    return kept


def answer_tokens(
    documents: Iterable[Document], render: Renderer, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Tensor, Tensor]:
    """Tokenize documents one by one; return the tokens, and whether each counts.

    Of a conversation, the answers count, each with what ends the message; a document without
    messages counts whole.

    Returns
    -------
    ids : Tensor, shape [n_tokens], int64
    counted : Tensor, shape [n_tokens], bool

    Raises
    ------
    DataError
        If the tokenizer does not tell which characters a token covers, or an answer is not found in
        what the chat template makes of its conversation.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "calibration.loss: answers needs a fast tokenizer (tokenizer.json), which tells where "
            "a token is in the text; name one under model.tokenizer, or set loss: all"
        )
    end = _end_of_answers(tokenizer)
    ids: list[int] = []
    counted: list[bool] = []
    for document in documents:
        text = render(document)
        if text is None:
            continue
        spans = [(0, len(text))]
        if isinstance(document, Conversation):
            spans = [*_answers(document, text, tokenizer, end)]
        separator = SEPARATOR if ids else ""
        found = tokenizer(
            separator + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids += found["input_ids"]
        counted += _inside(found["offset_mapping"], spans, len(separator))
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(counted, dtype=torch.bool)


def _inside(offsets: Iterable[Span], spans: list[Span], shift: int) -> Iterator[bool]:
    """Return for every token whether it shares a character with a span; both are in order."""
    left = iter(spans)
    start, end = next(left, (0, 0))
    for first, last in offsets:
        while end and first - shift >= end:
            start, end = next(left, (0, 0))
        yield bool(end) and last - shift > start


def _answers(
    conversation: Conversation, text: str, tokenizer: "PreTrainedTokenizerBase", end: str
) -> Iterator[Span]:
    """Return the characters of the answers in the rendered text of a conversation."""
    at = 0
    for number, message in enumerate(conversation.messages):
        content = message["content"]
        if message["role"] != ASSISTANT or not content.strip():
            continue
        # An answer may repeat what was said before it.
        before = _rendered(tokenizer, conversation.messages[:number]) if number else ""
        start = max(at, _common(before, text))
        if text.find(content, start) < 0:  # many templates leave out white space at both ends
            content = content.strip()
        at = text.find(content, start)
        if at < 0:
            raise DataError(
                f"calibration.source {conversation.where}, message {number + 1}: the chat template "
                f"changes the answer {shown(content)}, so that it is not found in the text; remove "
                "what the template leaves out (such as reasoning), or set loss: all"
            )
        start, at = at, at + len(content)
        if end and text.startswith(end, at):
            at += len(end)
        yield start, at


def _common(one: str, other: str) -> int:
    """Return the number of characters at the start that two texts share."""
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return next((number for number, (a, b) in enumerate(pairs) if a != b), shorter)


def _end_of_answers(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return what the chat template writes after an answer; empty if that cannot be found."""
    messages = [{"role": "user", "content": "x"}, {"role": ASSISTANT, "content": PROBE}]
    _, found, end = _rendered(tokenizer, messages).rpartition(PROBE)
    return end if found else ""


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]) -> str:
    """Return the text of a part of a conversation; empty if the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # jinja2 errors, and whatever a template raises itself
        return ""
