"""Read documents from a named source or a file."""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lrc.compressors.corpus.chat import Document, check_unicode, parse_conversation, shown
from lrc.compressors.corpus.hub import HUB_SOURCES, read_hub
from lrc.compressors.corpus.python_docs import python_docs
from lrc.compressors.io.fingerprint import sha256
from lrc.configs.errors import DataError, RecipeError

Part = Literal["calibration", "evaluation"]
SEPARATOR = "\n\n"
"""Between two documents, as in the perplexity of GPTQ, SliceGPT and SVD-LLM."""
BLOCK = 2**22  # bytes of a text file in memory at once; more than any separator
SOURCES = ("python-docs", *HUB_SOURCES)
SUFFIXES = (".jsonl", ".txt")
KEYS: dict[Part, str] = {
    "calibration": "calibration.source",
    "evaluation": "evaluate.perplexity.source",
}


class Continuation(str):
    """A document that continues the one before it, without a separator between them."""

    def __str__(self) -> str:
        """Return the object itself, so that rendering it keeps its type."""
        return self


def read_documents(
    source: str,
    *,
    part: Part,
    field: str = "text",
    chat: bool = False,
    characters: int | None = None,
    key: str | None = None,
) -> Iterator[Document]:
    """Read the documents of a source one by one, of which at least one is not blank.

    Named sources have two disjoint parts; a file is used whole for both. Blank rows of a data set
    are kept: they are part of its published text. `field` is the key of the text in a `.jsonl` row;
    with `chat` its `messages` are used if it has them. A `.txt` file is one document, or several of
    about `BLOCK` bytes; `Continuation` marks those that do not start after a blank line. If the
    source can be streamed, no more than `characters` are downloaded. Errors name the `key` of the
    recipe, by default that of the part.

    Raises
    ------
    RecipeError
        If the name is unknown or the file does not exist.
    DataError
        If the source is empty, binary, malformed or unreachable; at the end, if it is blank.
    """
    key = key or KEYS[part]
    check_source(source, part=part, key=key)
    documents: Iterator[Document]
    if source == "python-docs":
        documents = iter(python_docs(part))
    elif source in HUB_SOURCES:
        documents = read_hub(source, part=part, characters=characters)
    else:
        documents = _read_file(Path(source).expanduser(), key, field, chat)
    blank = True
    for document in documents:
        blank = blank and isinstance(document, str) and not document.strip()
        yield document
    if blank:
        raise DataError(f"{key} {source}: holds no text; give a source with some")


def check_source(source: str, *, part: Part, key: str | None = None) -> None:
    """Check that a source exists; for calibration, `self` samples from the model.

    Errors name the `key` of the recipe, by default that of the part.
    """
    if source in SOURCES or (source == "self" and part == "calibration"):
        return
    key, path, allowed = key or KEYS[part], Path(source).expanduser(), _allowed(part)
    if source == "self":
        raise RecipeError([f"{key}: 'self' is for calibration only; allowed: {allowed}"])
    if path.is_dir():
        raise RecipeError([f"{key}: {source} is a folder; give a .jsonl or .txt file in it"])
    if path.suffix.lower() not in SUFFIXES:
        got = f"a file ending '{path.suffix}'" if path.exists() else f"'{source}'"
        raise RecipeError([f"{key}: must be {allowed}, got {got}{_hint(path)}"])
    if not path.exists():
        raise RecipeError([f"{key}: no such file: {source}{_hint(path)}; allowed: {allowed}"])


def source_identity(source: str) -> str:
    """Return the name of a source, or for a file what identifies its content."""
    if source in SOURCES or source == "self":
        return source
    path = Path(source).expanduser()
    return f"{path.suffix.lower()} {sha256(path)}"


def _allowed(part: Part) -> str:
    names = (*SOURCES, "self") if part == "calibration" else SOURCES
    return f"{', '.join(names)} or the path of a .jsonl or .txt file"


def _hint(path: Path) -> str:
    """Suggest a named source or a neighbouring file of similar name."""
    names = get_close_matches(path.stem.lower(), SOURCES, n=1)
    if not names and path.parent.is_dir():
        neighbours = [p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES]
        names = [str(path.with_name(n)) for n in get_close_matches(path.name, neighbours, n=1)]
    return f"; did you mean '{names[0]}'?" if names else ""


def _read_file(path: Path, key: str, field: str, chat: bool) -> Iterator[Document]:
    where = f"{key} {path}"
    try:
        with path.open("rb") as file:
            if not file.peek(1):
                raise DataError(f"{where}: the file is empty; give a file with text")
            plain = path.suffix.lower() == ".txt"
            yield from _blocks(file, where) if plain else _rows(file, where, field, chat)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error


def _blocks(file: BinaryIO, where: str) -> Iterator[str]:
    """Split a text at the last blank line of every block, or else at its last line or character."""
    rest, offset, kind = b"", 0, str
    while len(block := file.read(BLOCK)) == BLOCK:
        text, found, rest = (rest + block).rpartition(SEPARATOR.encode())
        if not found:
            end = rest.rfind(b"\n") + 1 or _last_character(rest)
            text, rest = rest[:end], rest[end:]
        yield kind(_decode(text, where, offset))
        offset += len(text + found)
        kind = str if found else Continuation
    yield kind(_decode(rest + block, where, offset))


def _last_character(data: bytes) -> int:
    """Return where the last character of UTF-8 starts, which may be cut off."""
    start = len(data) - 1
    while start > 0 and data[start] & 0b11000000 == 0b10000000:
        start -= 1
    return start


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    """Decode UTF-8 that starts at an offset of the file or line."""
    if b"\0" in data:
        raise DataError(
            f"{where}: must be UTF-8 text, got NUL bytes (a binary or UTF-16 file);"
            " convert it to UTF-8"
        )
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be UTF-8 text, got byte 0x{data[error.start]:02x} at offset"
            f" {offset + error.start}; convert it to UTF-8"
        ) from error


def _rows(file: BinaryIO, where: str, field: str, chat: bool) -> Iterator[Document]:
    """Read JSON lines; blank lines are not rows."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        here = f"{where}, line {number}"
        text = _decode(line, here)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{here}: must be one JSON object, got {shown(text)} ({reason})"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{here}: must be a JSON object, got {shown(text)}")
        yield _document(row, here, field, chat)


def _document(row: dict[str, Any], where: str, field: str, chat: bool) -> Document:
    if chat and "messages" in row:
        return parse_conversation(row["messages"], where)
    if field not in row:
        chats = " (or set chat_template: true for rows with 'messages')" * ("messages" in row)
        raise DataError(
            f"{where}: no key '{field}'; got {', '.join(map(repr, row)) or 'an empty object'};"
            f" name the key that holds the text under 'field'{chats}"
        )
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be a string, got {shown(value)}")
    return check_unicode(value, f"{where}: '{field}'")
