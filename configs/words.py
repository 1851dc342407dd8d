"""The wording of errors about values: what is allowed, what was found, what to do about it."""

import math
import re
from collections.abc import Collection
from typing import Any

from lrc.configs.places import one_line
from lrc.configs.renamed import RENAMED_VALUES
from lrc.configs.shape import Shape, closest

Message = tuple[str, str]
"""Code and sentence."""

_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_NOUNS = {
    "null": "null",
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}
_MOST_KEYS = 8


def allowed(shape: Shape) -> str:
    """Describe what is allowed at one place: `null or a number > 0 and <= 1`."""
    return " or ".join(map(_allowed_part, shape.parts))


def _allowed_part(part: Shape) -> str:
    if part.options:
        one, *more = map(str, part.options)
        return f"one of {', '.join([one, *more])}" if more else f"'{one}'"
    if "pattern" in part.schema:
        return str(part.schema.get("x-words", f"a string like {part.schema['pattern']}"))
    if part.kind == "array":
        return f"a list of entries, each {allowed(Shape(part.schema['items'], part.root))}"
    if part.kind == "object" and part.entries is not None:
        return str(part.schema["x-words"])
    if part.kind == "object":
        return f"a mapping with the {keys(part.properties)}"
    limits = " and ".join(f"{sign} {limit}" for sign, _, limit in part.limits)
    rule = "that is not empty" if part.schema.get("minLength") else limits
    return f"{_NOUNS.get(part.kind, 'any value')} {rule}".rstrip()


def keys(names: Collection[str]) -> str:
    """Name keys: `key a`, `keys a, b`, or only the first if there are many."""
    others = " and others" if len(names) > _MOST_KEYS else ""
    return f"key{'s' if len(names) != 1 else ''} {', '.join(list(names)[:_MOST_KEYS])}{others}"


def missing(shape: Shape) -> Message:
    """Return code and message for a required key."""
    return "missing-key", f"missing; add {allowed(shape)}{_meaning(shape)}"


def _meaning(shape: Shape) -> str:
    described = " ".join(str(shape.schema.get("description", "")).split())
    first = re.split(r"\.(?: (?=[A-Z])|$)", described)[0]
    return f" ({first})" if first else ""


def got(value: Any) -> str:
    """Describe a value that was found, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and value:
        return f"a mapping with the {keys(value)}"
    if isinstance(value, list) and value:
        return f"a list of {len(value)} {'entry' if len(value) == 1 else 'entries'}"
    return f"'{one_line(value)}'" if isinstance(value, str) else one_line(repr(value))


def refusal(shape: Shape, value: Any) -> Message:
    """Return code and message for a value that is not allowed."""
    part = next((part for part in shape.parts if part.holds(value)), None)
    renamed = RENAMED_VALUES.get(str(value))
    if any(renamed in each.options for each in shape.parts):
        code, hint = "renamed-value", f"this value is now called '{renamed}'"
    elif part is None:
        code, hint = "wrong-type", _other_type(shape, value)
    elif not part.admits(value):
        code, hint = "unknown-value", _near(shape, value)
    else:
        code, hint = "out-of-range", _into_range(part, value)
    return code, f"must be {allowed(shape)}, got {got(value)}{hint and f'; {hint}'}"


def _near(shape: Shape, value: Any) -> str:
    options = {str(option): option for part in shape.parts for option in part.options}
    near = closest(value, options)
    if near is not None:
        return f"did you mean {got(options[near])}?"
    remedies = [each.schema["x-remedy"] for each in shape.parts if "x-remedy" in each.schema]
    several = len(options) > 1 and all(part.options for part in shape.parts)
    return next(iter(remedies), "choose one of them" if several else "")


def _into_range(part: Shape, value: Any) -> str:
    if isinstance(value, (str, list)):
        return "write it out" if isinstance(value, str) else "add at least 1 entry"
    if not math.isfinite(value):
        return "write a finite number"
    if part.schema.get("maximum") == 1 and 10 <= value <= 100:
        return f"for {value:g} % write {value / 100:g}"
    broken = next(sign for sign, within, limit in part.limits if not within(value, limit))
    return "raise it" if broken.startswith(">") else "lower it"


def _other_type(shape: Shape, value: Any) -> str:
    """Suggest what to write instead of a value of the wrong type; empty if nothing is likely."""
    if value is None:
        return "write a value or remove the key"
    if near := _near(shape, value):
        return near
    kinds = {part.kind: part for part in shape.parts}
    numeric = kinds.get("integer", kinds.get("number"))
    word = str(value).lower()
    word = _YES_NO.get(word, word)
    if kinds.keys() == {"null"}:
        return f"remove the key{_meaning(shape)}"
    if {"null", "object"} <= kinds.keys() and word in ("true", "false"):
        return "write {} for the defaults" if word == "true" else "remove the key"
    if "string" in kinds and isinstance(value, (bool, int, float)):
        return "put it in quotes"
    if "array" in kinds and numeric is None and isinstance(value, (str, int, float)):
        plain = re.fullmatch(r"[\w./-]+", str(value))
        return f"write a list: [{value if plain else repr(value)}]"
    if "array" in kinds and isinstance(value, dict):
        return "start every entry of the list with '- '"
    if "object" in kinds and isinstance(value, list):
        return "remove the '- ' in front of the keys"
    if "object" in kinds and ":" in str(value):
        return "put a space after the colon"
    if "boolean" in kinds:
        return f"write {word if word in ('true', 'false') else 'true or false'}"
    return "" if numeric is None else _as_number(numeric, str(value))


def _as_number(part: Shape, text: str) -> str:
    whole = part.kind == "integer"
    digits = text.removesuffix("%").replace("_", "").replace(",", "" if whole else ".")
    try:
        number = float(digits) / (100 if text.endswith("%") else 1)
    except ValueError:
        return ""
    if not part.covers(number) or (whole and not number.is_integer()):
        return ""
    return f"write {number:.0f}" if whole else f"write {number:.12g}"
