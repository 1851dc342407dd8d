"""Words for error sentences: what is allowed, what was found, what to do about it."""

import re
from typing import Any

from lrc.configs.places import one_line
from lrc.configs.renamed import RENAMED_VALUES
from lrc.configs.shape import Shape, closest

_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}

_MOST_KEYS, _FIRST_KEYS = 8, 3
"""A mapping with more keys than the first is named by as many as the second."""


def allowed(shape: Shape) -> str:
    """Say what may stand at one place: `a number in (0, 1]`, `a list of strings`."""
    parts = [_allowed_part(part) for part in shape.parts]
    if shape.nullable:  # never behind a list of keys, of which it would seem to be one
        parts.insert(0 if shape.mapping else len(parts), "null")
    return " or ".join(parts)


def meaning(shape: Shape) -> str:
    """Say what a key is for, its description's first sentence in parentheses; empty without one."""
    described = " ".join(str(shape.schema.get("description", "")).split())
    first = re.split(r"\.(?: (?=[A-Z])|$)", described)[0]
    return f" ({first})" if first else ""


def _allowed_part(part: Shape) -> str:
    if part.options:
        one, *more = [str(option) for option in part.options]
        return f"one of {', '.join([one, *more])}" if more else f"'{one}'"
    if part.words:
        return part.words
    if part.kind == "string":
        return "a string that is not empty" if part.schema.get("minLength") else "a string"
    if part.kind in ("integer", "number"):
        noun = {"integer": "a whole number", "number": "a number"}[part.kind]
        return f"{noun} {bounds(part)}".rstrip()
    if part.kind == "boolean":
        return "true or false"
    if part.kind == "array":
        return f"a list of {_allowed_entries(part.items)}"
    if part.kind == "object" and part.properties:
        return f"a mapping with the {_some_keys(list(part.properties))}"
    return "a mapping" if part.kind == "object" else "any value"


def _allowed_entries(items: Shape) -> str:
    plurals = {"string": "strings", "integer": "whole numbers", "number": "numbers"}
    if len(items.parts) == 1 and not items.options and items.kind in plurals:
        return f"{plurals[items.kind]} {bounds(items)}".rstrip()
    return f"entries, each {allowed(items)}"


def _some_keys(names: list[str]) -> str:
    if len(names) <= _MOST_KEYS:
        return keys(names)
    return f"{keys(names[:_FIRST_KEYS])} and others"


def keys(names: list[str]) -> str:
    """Name keys: `key a`, `keys a, b`."""
    return f"key{'s' if len(names) != 1 else ''} {', '.join(names) or '(none)'}"


def limits(part: Shape) -> tuple[float | None, float | None, bool, bool]:
    """Return lowest and highest value, and whether each is itself allowed."""
    get = part.schema.get
    low, high = get("minimum"), get("maximum")
    low_open, high_open = get("exclusiveMinimum"), get("exclusiveMaximum")
    if part.kind == "integer":  # say `>= 1` rather than `> 0`
        low = low_open + 1 if low_open is not None else low
        high = high_open - 1 if high_open is not None else high
        low_open = high_open = None
    return (
        low if low_open is None else low_open,
        high if high_open is None else high_open,
        low_open is None,
        high_open is None,
    )


def bounds(part: Shape) -> str:
    """Say the range of a number: `in (0, 1]`, `>= 1`, or nothing."""
    low, high, with_low, with_high = limits(part)
    if low is not None and high is not None:
        return f"in {'[' if with_low else '('}{low}, {high}{']' if with_high else ')'}"
    if low is not None:
        return f"{'>=' if with_low else '>'} {low}"
    if high is not None:
        return f"{'<=' if with_high else '<'} {high}"
    return ""


def got(value: Any) -> str:
    """Say what was found, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"a mapping with the {keys([str(key) for key in value])}" if value else "{}"
    if isinstance(value, list):
        entries = "entry" if len(value) == 1 else "entries"
        return f"a list of {len(value)} {entries}" if value else "[]"
    return f"'{one_line(value)}'" if isinstance(value, str) else one_line(repr(value))


def refusal(shape: Shape, value: Any) -> tuple[str, str]:
    """Return code and message for a value of the wrong kind, or that is no option."""
    text = f"must be {allowed(shape)}, got {got(value)}"
    renamed = RENAMED_VALUES.get(str(value))
    if renamed is not None and any(renamed in part.options for part in shape.parts):
        return "renamed-value", f"{text}; this value has a new name, '{renamed}'"
    hint = remedy(shape, value)
    right_kind = any(part.holds(value) for part in shape.parts)
    code = "unknown-value" if right_kind else "wrong-type"
    return code, f"{text}; {hint}" if hint else text


def remedy(shape: Shape, value: Any) -> str:
    """Say what to write instead of a value of the wrong kind; empty if nothing is likely."""
    kinds = {part.kind for part in shape.parts}
    options = {str(option): option for part in shape.parts for option in part.options}
    if value is None:
        return "write a value or remove the key"
    near = closest(value, options)
    if near is not None:
        return f"did you mean {got(options[near])}?"
    if shape.fixed:
        return f"remove the key{meaning(shape)}"
    if options:
        return ""
    named = next((part for part in shape.parts if part.words), None)
    if named is not None:
        return str(named.schema["x-remedy"])
    if shape.nullable and shape.mapping and not shape.mapping.required:
        wish = _YES_NO.get(str(value).lower(), str(value).lower())
        if wish in ("true", "false"):
            return "write {} for the defaults" if wish == "true" else "remove the key"
    if "string" in kinds and isinstance(value, (bool, int, float)):
        return "put it in quotes"
    numeric = next((part for part in shape.parts if part.kind in ("integer", "number")), None)
    if "array" in kinds and numeric is None and isinstance(value, (str, int, float)):
        plain = re.fullmatch(r"[\w./-]+", str(value))
        return f"write a list: [{value if plain else repr(value)}]"
    if "array" in kinds and isinstance(value, dict):
        return "start every entry of the list with '- '"
    if "object" in kinds and isinstance(value, list):
        return "remove the '- ' in front of the keys"
    if "object" in kinds and isinstance(value, str) and ":" in value:
        return "put a space after the colon"
    if "boolean" in kinds:
        return f"write {_YES_NO.get(str(value).lower(), 'true or false')}"
    if numeric is not None and isinstance(value, (str, float)):
        return _as_number(numeric, str(value))
    return ""


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


def back_in_range(part: Shape, value: float) -> str:
    """Say which way to go with a number that is out of range."""
    low, high, _, _ = limits(part)
    if high == 1 and 10 <= value <= 100:
        return f"for {value:g} % write {value / 100:g}"
    return "raise it" if low is not None and value <= low else "lower it"
