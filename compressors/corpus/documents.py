"""Read documents from a named source or a file."""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lrc.compressors.corpus.hub import HUB_SOURCES, read_hub
from lrc.compressors.corpus.python_docs import python_docs
from lrc.compressors.io.fingerprint import fingerprint
from lrc.configs.errors import DataError, RecipeError

Part = Literal["calibration", "evaluation"]
Document = str | list[dict[str, Any]]
"""Plain text, or the messages of a conversation."""

SOURCES = ("python-docs", *HUB_SOURCES)
SUFFIXES = (".jsonl", ".txt")
KEYS: dict[Part, str] = {
    "calibration": "calibration.source",
    "evaluation": "evaluate.perplexity.source",
}


def read_documents(
    source: str,
    *,
    part: Part,
    field: str = "text",
    chat: bool = False,
    characters: int | None = None,
) -> list[Document]:
    """Read the documents of a source, of which at least one is not blank.

    Named sources have two disjoint parts; a file is used whole for both. Blank rows of a data set
    are kept: they are part of its published text. `field` is the key of the text in a `.jsonl` row;
    with `chat` its `messages` are used if it has them. If the source can be streamed, no more than
    `characters` are downloaded.

    Raises
    ------
    RecipeError
        If the name is unknown or the file does not exist.
    DataError
        If the source is empty, binary, malformed or unreachable.
    """
    check_source(source, part=part)
    documents: list[Document]
    if source == "python-docs":
        documents = list(python_docs(part))
    elif source in HUB_SOURCES:
        documents = list(read_hub(source, part=part, characters=characters))
    else:
        path = Path(source).expanduser()
        where = f"{KEYS[part]} {path}"
        if path.suffix.lower() == ".txt":
            documents = [_decode(_read(path, where), where)]
        else:
            documents = list(_rows(_read(path, where), where, field, chat))
    if not any(isinstance(each, list) or each.strip() for each in documents):
        raise DataError(f"{KEYS[part]} {source}: holds no text; give a source with some")
    return documents


def check_source(source: str, *, part: Part) -> None:
    """Check that a source exists; for calibration, `self` samples from the model."""
    if source in SOURCES or (source == "self" and part == "calibration"):
        return
    key, path = KEYS[part], Path(source).expanduser()
    if source == "self":
        raise RecipeError([f"{key}: 'self' is for calibration only; allowed: {_allowed()}"])
    if path.is_dir():
        raise RecipeError([f"{key}: {source} is a folder; give a .jsonl or .txt file in it"])
    if path.suffix.lower() not in SUFFIXES:
        got = f"a file ending '{path.suffix}'" if path.exists() else f"'{source}'"
        raise RecipeError([f"{key}: must be {_allowed()}, got {got}{_hint(path)}"])
    if not path.exists():
        raise RecipeError([f"{key}: no such file: {source}{_hint(path)}; allowed: {_allowed()}"])


def source_identity(source: str) -> str:
    """Return the name of a source, or for a file what identifies its content."""
    if source in SOURCES or source == "self":
        return source
    path = Path(source).expanduser()
    return f"{path.suffix.lower()} {fingerprint(path, whole=True)}"


def _allowed() -> str:
    return f"{', '.join(SOURCES)} or the path of a .jsonl or .txt file"


def _hint(path: Path) -> str:
    """Suggest a named source or a neighbouring file of similar name."""
    names = get_close_matches(path.stem.lower(), SOURCES, n=1)
    if not names and path.parent.is_dir():
        neighbours = [p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES]
        names = [str(path.with_name(n)) for n in get_close_matches(path.name, neighbours, n=1)]
    return f"; did you mean '{names[0]}'?" if names else ""


def _read(path: Path, where: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    if not data:
        raise DataError(f"{where}: the file is empty; give a file with text")
    return data


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise DataError(
            f"{where}: must be UTF-8 text, got NUL bytes (a binary or UTF-16 file);"
            " convert it to UTF-8"
        )
    try:
        return data.decode("utf-8-sig")  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be UTF-8 text, got byte 0x{data[error.start]:02x} at offset"
            f" {error.start}; convert it to UTF-8"
        ) from error


def _rows(data: bytes, where: str, field: str, chat: bool) -> Iterator[Document]:
    """Read JSON lines; blank lines are not rows."""
    if b"\0" in data:
        _decode(data, where)
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        here = f"{where}, line {number}"
        text = _decode(line, here)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{here}: must be one JSON object, got {_shown(text)} ({reason})"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{here}: must be a JSON object, got {_shown(text)}")
        yield _document(row, here, field, chat)


def _document(row: dict[str, Any], where: str, field: str, chat: bool) -> Document:
    if chat and "messages" in row:
        messages = row["messages"]
        if not (isinstance(messages, list) and messages) or not all(
            isinstance(m, dict) and "role" in m and "content" in m for m in messages
        ):
            raise DataError(
                f"{where}: 'messages' must be a list of objects with 'role' and 'content',"
                f" got {_shown(json.dumps(messages))}"
            )
        return messages
    if field not in row:
        chats = " (or set chat_template: true for rows with 'messages')" * ("messages" in row)
        raise DataError(
            f"{where}: no key '{field}'; got {', '.join(map(repr, row)) or 'an empty object'};"
            f" name the key that holds the text under 'field'{chats}"
        )
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be a string, got {_shown(json.dumps(value))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON and no text
        raise DataError(
            f"{where}: '{field}' must be Unicode text, got half a surrogate pair at character"
            f" {error.start}; repair the escape"
        ) from error
    return value


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 40 else text[:40] + "...")
