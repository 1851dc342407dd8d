"""Take the text that a calibration needs from a text of any length."""

import hashlib
import json
from collections.abc import Iterable, Iterator

from lrc.compressors.corpus.chat import Document, Renderer, size
from lrc.compressors.corpus.documents import SEPARATOR, Continuation


class TextHash:
    """SHA-256 of documents joined by a blank line; of conversations, of their messages as JSON."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._separator = b""

    def reading(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass documents on, adding each."""
        for document in documents:
            text = document if isinstance(document, str) else json.dumps(document.messages)
            if not isinstance(document, Continuation):
                self._hash.update(self._separator)
            self._hash.update(text.encode())
            self._separator = SEPARATOR.encode()
            yield document

    def hexdigest(self) -> str:
        """Return the hash of everything read."""
        return self._hash.hexdigest()


def joined(documents: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text: documents, and blank lines between them."""
    for number, document in enumerate(documents):
        if number and not isinstance(document, Continuation):
            yield SEPARATOR
        yield document


def measured(document: Document) -> int:
    """Return the characters that a document adds to a text."""
    return size(document) + len(SEPARATOR)


def excerpts(
    documents: Iterable[Document],
    render: Renderer,
    *,
    total: int,
    count: int,
    characters: int,
) -> Iterator[str]:
    """Take `count` evenly spaced excerpts from documents of `total` characters (`measured`).

    An excerpt has about ``characters / count`` characters. Documents that are not longer are kept
    whole; only those that are needed are rendered.
    """
    length = max(1, characters // count)
    end = 0
    for document in documents:
        start, end = end, end + measured(document)
        # Excerpt k begins at k * total // count: the first that ends after this document begins,
        # and the first that begins after it ends.
        first = max(0, -(-(start - length + 1) * count // total))
        last = min(count, -(-end * count // total))
        if first >= last:
            continue
        text = render(document)
        if text is None:
            continue
        if end - start <= length:
            yield text
            continue
        scale = len(text) / (end - start)  # a template makes a document longer
        for number in range(first, last):
            begin = number * total // count - start
            piece = text[max(0, int(begin * scale)) : max(0, int((begin + length) * scale))]
            if piece:
                yield piece
