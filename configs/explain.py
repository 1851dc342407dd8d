"""Explain why a recipe is refused: one problem for each mistake.

pydantic decides whether a recipe is valid. Its error list stops inside a mapping whose kind it
cannot tell and speaks of unions and tags, so the messages are written here, by checking the values
against the JSON Schema of the same models. Rules that are code (`Override`'s "exactly one of") are
taken from pydantic's list.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from lrc.configs.errors import Problem
from lrc.configs.places import Path, Places, problem_at
from lrc.configs.renamed import RENAMED_KEYS
from lrc.configs.shape import Shape, closest
from lrc.configs.words import Message, keys, missing, refusal


def explain(error: ValidationError, value: Any, shape: Shape, places: Places) -> list[Problem]:
    """Return everything that is wrong with a recipe, as read and before short forms are expanded.

    `error` is what pydantic found in it, and `shape` what is allowed.
    """
    found = list(_check(shape, value, ()))
    errors = error.errors(include_url=False, include_input=False)
    for each in errors:
        if each["type"] == "value_error":
            path, refused = _written(each["loc"], value)
            code = "conflicting-keys" if isinstance(refused, dict) else "unknown-value"
            found.append((path, (code, str(each["ctx"]["error"]))))
    if not found:  # a rule that `Shape` does not know
        found = [
            (_written(each["loc"], value)[0], ("invalid-value", each["msg"])) for each in errors
        ]
    return [problem_at(path, *message, places) for path, message in dict.fromkeys(found)]


def _check(shape: Shape, value: Any, path: Path) -> Iterator[tuple[Path, Message]]:
    """Yield what is wrong with `value` and with everything inside it."""
    part = next((part for part in shape.parts if part.holds(value)), None)
    if part is None or not part.admits(value) or not part.covers(value):
        yield path, refusal(shape, value)
    elif isinstance(value, dict) and part.entries is not None:
        for key, each in value.items():
            yield from _check(part.entries, each, (*path, key))
    elif isinstance(value, dict):
        yield from _check_mapping(part, value, path)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _check(Shape(part.schema["items"], part.root), each, (*path, index))


def _check_mapping(
    shape: Shape, value: Mapping[str, Any], path: Path
) -> Iterator[tuple[Path, Message]]:
    meant = shape.variant(value)
    properties = meant.properties
    if shape.tag is not None:
        properties = properties | {shape.tag: shape.properties[shape.tag]}
    corrected: set[str] = set()
    for key, each in value.items():
        if key in properties:
            yield from _check(properties[key], each, (*path, key))
            continue
        renamed = RENAMED_KEYS.get(key)
        known = renamed if renamed in properties else closest(key, properties)
        yield (*path, key), _unknown_key(key, value, shape, properties, known)
        if known is not None and known not in value:
            corrected.add(known)
            inner = properties[known]
            if known != renamed or any(part.holds(each) for part in inner.parts):
                yield from _check(inner, each, (*path, key))
    required = meant.schema.get("required", [shape.tag] if shape.tag else [])
    for key in required:
        if key not in value and key not in corrected:
            yield (*path, key), missing(properties[key])
    if not value and not required and "oneOf" in shape.schema:
        yield path, ("missing-key", f"is empty; write one of the {keys(properties)}")


def _unknown_key(
    key: str,
    value: Mapping[str, Any],
    shape: Shape,
    properties: Mapping[str, Shape],
    known: str | None,
) -> Message:
    if key in shape.properties and shape.tag is None:  # another kind of entry
        beside = next(other for other in value if other in properties)
        text = f"not allowed together with '{beside}'; make it a separate entry, starting with '- '"
        return "misplaced-key", text
    allow = f"Allowed: {', '.join(properties)}"
    if known is not None and known == RENAMED_KEYS.get(key):
        return "renamed-key", f"this key is now called '{known}'; rename it"
    if shape.tag is not None and shape.tag in value and key in shape.properties:
        text = f"not a key of {shape.tag} '{value[shape.tag]}'; remove it. {allow}"
        return "misplaced-key", text
    homes = [name for name, inner in properties.items() if inner.names(key)]
    if homes:
        return "misplaced-key", f"unknown key here; move it under '{homes[0]}'. {allow}"
    remedy = f"did you mean '{known}'?" if known is not None else "remove it."
    return "unknown-key", f"unknown key; {remedy} {allow}"


def _written(location: tuple[str | int, ...], value: Any) -> tuple[Path, Any]:
    """Keep of pydantic's location what exists in the recipe: it adds tags and short-form keys.

    Returns the rest of the location, and the value there.
    """
    path: Path = ()
    for step in location:
        is_key = isinstance(value, dict) and step in value
        is_index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if is_key or is_index:
            path, value = (*path, step), value[step]
    return path, value
