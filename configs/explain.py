"""Explain why a recipe is refused: one finding for each problem.

pydantic decides whether a recipe is valid. Its error list stops inside a mapping whose kind it
cannot tell and speaks of unions and tags, so the messages are written here, by checking the values
against the JSON Schema of the same models. Rules that are code (`Override`'s "exactly one of") are
taken from pydantic's list.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from lrc.configs.places import Finding, Path
from lrc.configs.renamed import RENAMED_KEYS
from lrc.configs.shape import Shape, closest
from lrc.configs.words import allowed, back_in_range, bounds, got, keys, meaning, refusal


def explain(error: ValidationError, value: Any, shape: Shape) -> list[Finding]:
    """Return everything that is wrong with a value.

    Parameters
    ----------
    error : ValidationError
        The errors that pydantic found in `value`.
    value : Any
        The recipe as read, before short forms are expanded.
    shape : Shape
        What is allowed.
    """
    found = list(_check(shape, value, ()))
    for each in error.errors(include_url=False, include_input=False):
        path, here = _follow(each["loc"], value)
        if each["type"] == "value_error":
            found.append(Finding(path, "conflicting-keys", str(each["ctx"]["error"])))
        elif each["type"] in ("missing", "extra_forbidden"):
            continue  # `_check` knows all keys, and which variant's keys are meant
        elif not any(_related(path, known.path) for known in found):
            # a constraint that `_check` does not know, such as a pattern without a name
            text = f"this value is not allowed, got {got(here)}; write another"
            found.append(Finding(path, "invalid-value", text))
    return list(dict.fromkeys(found))


def _check(shape: Shape, value: Any, path: Path) -> Iterator[Finding]:
    """Yield what is wrong with `value` and with everything inside it."""
    if value is None and shape.nullable:
        return
    part = next((part for part in shape.parts if part.holds(value)), None)
    if part is None or not part.admits(value):
        yield Finding(path, *refusal(shape, value))
    elif isinstance(value, dict):
        yield from _check_mapping(part, value, path)
    elif isinstance(value, list):
        yield from _check_list(part, value, path)
    elif isinstance(value, str) and len(value) < part.schema.get("minLength", 0):
        text = f"must be {allowed(shape)}, got {got(value)}; write it out"
        yield Finding(path, "out-of-range", text)
    elif isinstance(value, float) and not math.isfinite(value):
        text = f"must be finite, got {got(value)}; write {allowed(shape)}"
        yield Finding(path, "out-of-range", text)
    elif isinstance(value, (int, float)) and not part.covers(value):
        text = f"must be {bounds(part)}, got {got(value)}; {back_in_range(part, value)}"
        yield Finding(path, "out-of-range", text)


def _check_mapping(shape: Shape, value: Mapping[str, Any], path: Path) -> Iterator[Finding]:
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
        yield Finding((*path, key), *_unknown_key(key, value, shape, properties, known))
        if known is not None and known not in value:
            corrected.add(known)
            inner = properties[known]
            if known != renamed or any(part.holds(each) for part in inner.parts):
                yield from _check(inner, each, (*path, key))
    for key in meant.required:
        if key not in value and key not in corrected:
            text = f"missing; add {allowed(properties[key])}{meaning(properties[key])}"
            yield Finding((*path, key), "missing-key", text)
    if not value and not meant.required and meant.variants:
        text = f"is empty; write one of the {keys(list(properties))}"
        yield Finding(path, "missing-key", text)


def _unknown_key(
    key: str,
    value: Mapping[str, Any],
    shape: Shape,
    properties: Mapping[str, Shape],
    known: str | None,
) -> tuple[str, str]:
    """Return code and message for a key that does not belong where it is."""
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
    mappings = {name: inner.mapping for name, inner in properties.items()}
    homes = [name for name, inner in mappings.items() if inner and key in inner.properties]
    if homes:
        return "misplaced-key", f"unknown key here; move it under '{homes[0]}'. {allow}"
    if known is not None:
        return "unknown-key", f"unknown key; did you mean '{known}'? {allow}"
    return "unknown-key", f"unknown key; remove it. {allow}"


def _check_list(shape: Shape, value: list[Any], path: Path) -> Iterator[Finding]:
    if len(value) < shape.schema.get("minItems", 0):
        least = shape.schema["minItems"]
        entries = "entry" if least == 1 else "entries"
        text = f"must have at least {least} {entries}, got {got(value)}; add one"
        yield Finding(path, "out-of-range", text)
    for index, each in enumerate(value):
        yield from _check(shape.items, each, (*path, index))


def _related(one: Path, other: Path) -> bool:
    """Whether one of two places lies inside the other."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _follow(location: tuple[str | int, ...], value: Any) -> tuple[Path, Any]:
    """Keep of pydantic's location what exists in the recipe: it adds tags and short-form keys."""
    path: Path = ()
    for step in location:
        is_key = isinstance(value, dict) and step in value
        is_index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if is_key or is_index:
            path, value = (*path, step), value[step]
    return path, value
