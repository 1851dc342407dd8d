"""Conversations: the `messages` of a row, and their text by the tokenizer's chat template."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrc.configs.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 40


@dataclass(frozen=True)
class Conversation:
    """Messages whose `content` is a string, and where they were read."""

    messages: list[dict[str, Any]]
    where: str
    """File and line, for errors."""


Document = str | Conversation
Renderer = Callable[[Document], str | None]
"""Returns the text of a document, or None to leave it out."""


def size(document: Document) -> int:
    """Return the number of characters of a document, before a template adds some."""
    if isinstance(document, str):
        return len(document)
    return sum(len(message["content"]) for message in document.messages)


def parse_conversation(messages: Any, where: str) -> Conversation:
    """Check the messages of a row, and join the text parts of every content.

    Raises
    ------
    DataError
        If a message has no role, or a content other than text. Only a message with tool calls may
        have none.
    """
    if not (isinstance(messages, list) and messages):
        raise DataError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content',"
            f" got {shown(messages)}"
        )
    return Conversation(
        [_message(message, f"{where}, message {n}") for n, message in enumerate(messages, 1)], where
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content',"
            f" got {shown(message)}; give every message a role"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # a template would write "None"
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for number, part in enumerate(parts, 1):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            which, got = (f", part {number}", part) if parts is content else ("", content)
            raise DataError(
                f"{where}{which}: 'content' must be a string or a list of text parts"
                f' ({{"type": "text", "text": ...}}), got {shown(got)}; remove the row, or keep'
                " only the text"
            )
        texts.append(text)
    return message | {"content": check_unicode("".join(texts), f"{where}: 'content'")}


def check_unicode(text: str, where: str) -> str:
    """Return a text, or raise `DataError` if it has half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON and no text
        raise DataError(
            f"{where} must be Unicode text, got half a surrogate pair at character"
            f" {error.start}; repair the escape"
        ) from error
    return text


def shown(value: Any) -> str:
    """Return the beginning of a value, as JSON, for an error."""
    text = (value if isinstance(value, str) else json.dumps(value)).strip()
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def chat_renderer(tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Return the function that renders a document by the tokenizer's chat template.

    Plain text becomes one user turn; blank text is left out.

    Raises
    ------
    DataError
        If the tokenizer has no chat template; when called, if the template refuses a conversation
        or leaves out its tool calls.
    """
    name, template = tokenizer.name_or_path or "unnamed", tokenizer.chat_template
    if not template:
        raise DataError(
            f"calibration.chat_template: the tokenizer ({name}) has"
            " no chat template; set chat_template: false or name the tokenizer of an instruct"
            " model under model.tokenizer"
        )

    def render(document: Document) -> str | None:
        if isinstance(document, str):
            if not document.strip():
                return None
            document = Conversation([{"role": "user", "content": document}], shown(document))
        calls = any(message.get("tool_calls") for message in document.messages)
        if calls and "tool_calls" not in str(template):
            raise DataError(
                f"calibration.source {document.where}: has tool calls, which the chat template of"
                f" the tokenizer ({name}) leaves out; remove the row, or name another tokenizer"
                " under model.tokenizer"
            )
        try:
            return str(tokenizer.apply_chat_template(document.messages, tokenize=False))
        except Exception as error:  # jinja2 errors, and whatever a template raises itself
            reason = " ".join(str(error).split())
            raise DataError(
                f"calibration.chat_template: the tokenizer's template refuses {document.where}:"
                f" {reason}; repair its messages or set chat_template: false"
            ) from error

    return render
