"""The wording of errors about values: what is allowed, what was found, what to do about it."""

import re
from typing import Any

from lrc.configs.places import one_line
from lrc.configs.renamed import RENAMED_VALUES
from lrc.configs.shape import Shape, closest

_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}

_MOST_KEYS, _FIRST_KEYS = 8, 3
"""A mapping with more keys than the first is named by as many as the second."""


def allowed(shape: Shape) -> str:
    """Describe what is allowed at one place: `a number in (0, 1]`, `a list of strings`."""
    parts = [_allowed_part(part) for part in shape.parts]
    if shape.nullable:  # before a list of keys, or it would look like one of them
        parts.insert(0 if shape.mapping else len(parts), "null")
    return " or ".join(parts)


def meaning(shape: Shape) -> str:
    """Return the first sentence of a key's description in parentheses; empty without one."""
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


def _limits(part: Shape) -> tuple[float | None, float | None, str, str]:
    """Return lowest and highest value, and the brackets that tell whether each is included."""
    low, high = part.schema.get("minimum"), part.schema.get("maximum")
    above, below = part.schema.get("exclusiveMinimum"), part.schema.get("exclusiveMaximum")
    if part.kind == "integer":  # `>= 1` rather than `> 0`
        low = low if above is None else above + 1
        high = high if below is None else below - 1
    opening, closing = "[" if low is not None else "(", "]" if high is not None else ")"
    return above if low is None else low, below if high is None else high, opening, closing


def bounds(part: Shape) -> str:
    """Describe the range of a number: `in (0, 1]`, `>= 1`, or nothing."""
    low, high, opening, closing = _limits(part)
    if low is not None and high is not None:
        return f"in {opening}{low}, {high}{closing}"
    if low is not None:
        return f"{'>=' if opening == '[' else '>'} {low}"
    if high is not None:
        return f"{'<=' if closing == ']' else '<'} {high}"
    return ""


def got(value: Any) -> str:
    """Describe a value that was found, shortened."""
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
    """Return code and message for a value of the wrong type or that is not an option."""
    text = f"must be {allowed(shape)}, got {got(value)}"
    renamed = RENAMED_VALUES.get(str(value))
    if renamed is not None and any(renamed in part.options for part in shape.parts):
        return "renamed-value", f"{text}; this value is now called '{renamed}'"
    hint = remedy(shape, value)
    right_kind = any(part.holds(value) for part in shape.parts)
    code = "unknown-value" if right_kind else "wrong-type"
    return code, f"{text}; {hint}" if hint else text


def remedy(shape: Shape, value: Any) -> str:
    """Suggest what to write instead of a wrong value; empty if nothing is likely."""
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
    """Suggest how to correct a number that is out of range."""
    low, high, _, _ = _limits(part)
    if high == 1 and 10 <= value <= 100:
        return f"for {value:g} % write {value / 100:g}"
    return "raise it" if low is not None and value <= low else "lower it"
