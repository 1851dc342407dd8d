"""Tokenize a text of any length in little memory.

A fast tokenizer needs about 200 bytes of memory per character, so a text is tokenized in chunks
that overlap. Two neighbours are joined inside the overlap, where both have the same tokens at the
same characters: the result is that of the whole text.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrc.configs.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK, OVERLAP = 2**17, 2**12  # characters
AGREEING = 8  # tokens on either side of a joint
CHARACTERS_PER_TOKEN = 8  # more than in most texts


def tokenize(
    text: str | Iterable[str], tokenizer: "PreTrainedTokenizerBase", *, limit: int | None = None
) -> Tensor:
    """Return the tokens [n_tokens] (int64) of a text, without special tokens.

    Parameters
    ----------
    text : str or iterable of str
        The text, or its consecutive pieces; read no further than `limit` needs.
    limit : int, optional
        Return at most the first `limit` tokens.
    """
    pieces: Iterable[str] = (text,) if isinstance(text, str) else text
    # Only fast tokenizers tell which characters a token covers.
    cut = _joined if getattr(tokenizer, "is_fast", False) else _prefixes
    size = CHUNK
    if limit is not None:  # a short start of the text does not need long chunks
        size = min(CHUNK, max(4 * OVERLAP, CHARACTERS_PER_TOKEN * limit))
    found, n_tokens = [torch.empty(0, dtype=torch.int64)], 0
    for ids in cut(pieces, tokenizer, size):
        found.append(torch.tensor(ids, dtype=torch.int64))
        n_tokens += len(ids)
        if limit is not None and n_tokens >= limit:
            break
    return torch.cat(found)[:limit]


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


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a chunk, and the characters [start, end) that each covers."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def around(self, index: int, origin: int) -> list[tuple[int, int, int]]:
        """Return the tokens on both sides of an index, with characters counted from `origin`."""
        near = slice(max(0, index - AGREEING), index + AGREEING)
        found = zip(self.ids[near], self.starts[near], self.ends[near], strict=True)
        return [(token, start - origin, end - origin) for token, start, end in found]


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase", first: int = 0) -> _Encoded:
    """Tokenize a chunk from character `first` on."""
    encoded = tokenizer(
        text[first:], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    return _Encoded(
        encoded["input_ids"], [s + first for s, _ in offsets], [e + first for _, e in offsets]
    )


def _joined(
    pieces: Iterable[str], tokenizer: "PreTrainedTokenizerBase", size: int
) -> Iterator[list[int]]:
    """Yield the tokens of a text chunk by chunk, each up to the joint with the next."""
    before, first = _Encoded([], [], []), 0
    for text in _chunks(pieces, size):
        after = _encode(text, tokenizer)
        joint = _joint(before, after, size)
        if joint is None:  # they disagree everywhere, as in one endless word: cut it
            end = bisect_left(before.starts, size - OVERLAP // 2)
            start = before.starts[end] if end < len(before.starts) else size
            after, joint = _encode(text, tokenizer, start - (size - OVERLAP)), (end, 0)
        yield before.ids[first : joint[0]]
        before, first = after, joint[1]
    yield before.ids[first:]


def _prefixes(
    pieces: Iterable[str], tokenizer: "PreTrainedTokenizerBase", size: int
) -> Iterator[list[int]]:
    """Yield the tokens of a text from prefixes that double in length, except for the last ones."""
    text, done, wanted = "", 0, size
    for chunk in _chunks(pieces, size):
        text += chunk if not text else chunk[OVERLAP:]
        if len(text) >= wanted:
            ids = _encode_plain(text, tokenizer)[:-OVERLAP]  # the end of the prefix may cut a token
            yield ids[done:]
            done, wanted = max(done, len(ids)), 2 * len(text)
    yield _encode_plain(text, tokenizer)[done:]


def _encode_plain(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    # verbose=False: no warning about the length, as the text is cut into windows
    encoded: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _joint(before: _Encoded, after: _Encoded, size: int) -> tuple[int, int] | None:
    """Return the tokens of two neighbours that start at a character where they agree."""
    if not before.ids:
        return 0, 0
    origin = size - OVERLAP  # of the second chunk in the first
    for i in range(bisect_left(before.starts, size - OVERLAP // 2), len(before.ids)):
        j = bisect_left(after.starts, before.starts[i] - origin)
        if before.around(i, origin) == after.around(j, 0):
            return i, j
    return None


def _chunks(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Cut a text into chunks of `size` characters, of which neighbours share `OVERLAP`."""
    held: list[str] = []
    length = fresh = 0
    for piece in pieces:
        for start in range(0, len(piece), size):
            part = piece[start : start + size]
            held.append(part)
            length, fresh = length + len(part), fresh + len(part)
            while length >= size:
                text = "".join(held)
                yield text[:size]
                held = [text[size - OVERLAP :]]
                length, fresh = len(held[0]), len(text) - size
    if fresh:
        yield "".join(held)
