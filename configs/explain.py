"""Why a recipe is refused: one sentence for every problem, in the words of this project.

pydantic decides whether a recipe is valid. Its error list stops inside a mapping whose kind it
cannot tell and speaks of unions and tags, so the sentences are written here, by holding the values
against the JSON Schema made from the same models. Rules that are code (`Override`'s "exactly one
of") are taken from pydantic's list.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from lrc.configs.places import Path
from lrc.configs.shape import Shape, closest
from lrc.configs.words import allowed, back_in_range, bounds, got, keys, meaning, remedy

Finding = tuple[Path, str]


def explain(error: ValidationError, value: Any, shape: Shape) -> list[Finding]:
    """Return path and sentence of everything that is wrong with a value.

    Parameters
    ----------
    error : ValidationError
        What pydantic said about `value`.
    value : Any
        The recipe as read, before short forms are written out.
    shape : Shape
        What is allowed.
    """
    found = list(_check(shape, value, ()))
    for each in error.errors(include_url=False, include_input=False):
        path, here = _follow(each["loc"], value)
        if each["type"] == "value_error":
            found.append((path, str(each["ctx"]["error"])))
        elif each["type"] in ("missing", "extra_forbidden"):
            continue  # `_check` knows all keys, and which variant's keys are meant
        elif not any(_related(path, known) for known, _ in found):
            # a constraint that `_check` does not know, such as a pattern without a name
            found.append((path, f"this value is not allowed, got {got(here)}; write another"))
    return list(dict.fromkeys(found))


def _check(shape: Shape, value: Any, path: Path) -> Iterator[Finding]:
    """Yield what is wrong with `value` and with everything inside it."""
    if value is None and shape.nullable:
        return
    part = next((part for part in shape.parts if part.holds(value)), None)
    if part is None or not part.admits(value):
        hint = remedy(shape, value)
        yield path, f"must be {allowed(shape)}, got {got(value)}" + (f"; {hint}" if hint else "")
    elif isinstance(value, dict):
        yield from _check_mapping(part, value, path)
    elif isinstance(value, list):
        yield from _check_list(part, value, path)
    elif isinstance(value, str) and len(value) < part.schema.get("minLength", 0):
        yield path, f"must be {allowed(shape)}, got {got(value)}; write it out"
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"must be finite, got {got(value)}; write {allowed(shape)}"
    elif isinstance(value, (int, float)) and not part.covers(value):
        text = f"must be {bounds(part)}, got {got(value)}; {back_in_range(part, value)}"
        yield path, text


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
        if meant.any_key is not None:
            yield from _check(meant.any_key, each, (*path, key))
            continue
        known = closest(key, properties)
        yield (*path, key), _unknown_key(key, value, shape, properties, known)
        if known is not None and known not in value:
            corrected.add(known)
            yield from _check(properties[known], each, (*path, key))
    for key in meant.required:
        if key not in value and key not in corrected:
            yield (*path, key), _missing(properties[key])
    if not value and not meant.required and meant.variants:
        yield path, f"is empty; write one of the {keys(list(properties))}"


def _unknown_key(
    key: str,
    value: Mapping[str, Any],
    shape: Shape,
    properties: Mapping[str, Shape],
    known: str | None,
) -> str:
    if key in shape.properties and shape.tag is None:  # another kind of entry
        beside = next(other for other in value if other in properties)
        return f"cannot stand beside '{beside}'; make it an entry of its own, with '- ' in front"
    allow = f"Allowed: {', '.join(properties)}"
    if shape.tag is not None and shape.tag in value and key in shape.properties:
        return f"not a key of {shape.tag} '{value[shape.tag]}'; remove it. {allow}"
    mappings = {name: inner.mapping for name, inner in properties.items()}
    homes = [name for name, inner in mappings.items() if inner and key in inner.properties]
    if homes:
        return f"unknown key here; move it under '{homes[0]}'. {allow}"
    if known is not None:
        return f"unknown key; did you mean '{known}'? {allow}"
    return f"unknown key; remove it. {allow}"


def _missing(shape: Shape) -> str:
    return f"missing; add {allowed(shape)}{meaning(shape)}"


def _check_list(shape: Shape, value: list[Any], path: Path) -> Iterator[Finding]:
    if len(value) < shape.schema.get("minItems", 0):
        least = shape.schema["minItems"]
        entries = "entry" if least == 1 else "entries"
        yield path, f"must have at least {least} {entries}, got {got(value)}; add one"
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
