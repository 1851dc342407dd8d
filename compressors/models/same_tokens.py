"""Compare the tokens of two models that read and write the same token ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrc.compressors.io.shortened import shortened


@dataclass(frozen=True)
class Tokens:
    """The meaning of the token ids of a model."""

    size: int
    """Rows of its embedding, which may be more than there are tokens."""
    ids: Mapping[str, int]
    """Token -> id."""

    @classmethod
    def of(cls, config: Any, tokenizer: Any) -> "Tokens":
        """Return those of a config and a tokenizer of transformers."""
        return cls(int(config.get_text_config().vocab_size), tokenizer.get_vocab())


def difference(one: Tokens, other: Tokens) -> str | None:
    """Return a clause that says how the tokens of two models differ; None if they are the same.

    >>> difference(Tokens(3, {"a": 0, "b": 1}), Tokens(3, {"a": 1, "b": 0, "c": 2}))
    "they differ in 'a' (ids 0 and 1), 'b' (ids 1 and 0), 'c' (ids none and 2)"
    """
    if one.size != other.size:
        return f"the models have {one.size:,} and {other.size:,} tokens"
    differ = sorted(dict(one.ids.items() ^ other.ids.items()))
    if not differ:
        return None
    ids = [[each.ids.get(token, "none") for each in (one, other)] for token in differ]
    found = [
        f"{token!r} (ids {first} and {second})"
        for token, (first, second) in zip(differ, ids, strict=True)
    ]
    return f"they differ in {shortened(found, ', ')}"


def why_no_drafter(drafter: str, parent: str, tokens: tuple[Tokens, Tokens]) -> str | None:
    """Return why a model cannot draft for its parent, of which it must have the tokens.

    Parameters
    ----------
    drafter, parent : str
        Folders, Hub ids or GGUF files, for the message.
    tokens : tuple of Tokens
        Of the parent and of the drafter.

    Returns
    -------
    str or None
        Without a remedy; None if the tokens are the same.
    """
    why = difference(*tokens)
    if why is None:
        return None
    return (
        f"{drafter} must have the tokens of {parent}, because drafts are compared token by token, "
        f"but {why}"
    )
