"""Overrides of single values: `stages.0.decompose.keep=0.6`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrc.configs.errors import Problem
from lrc.configs.places import Path, Placed, Places, dotted, one_line
from lrc.configs.shape import Shape
from lrc.configs.words import got
from lrc.configs.yaml_text import YamlError, read_yaml

FIRST = 1_000_000_000
"""What sorts problems of the first override, after every line of a file."""


@dataclass(frozen=True)
class Assignment:
    """One override, read."""

    order: int
    label: str
    path: Path
    value: Any


class _CannotApplyError(Exception):
    """The path of an override leads nowhere."""


def read_overrides(overrides: Sequence[str]) -> tuple[list[Assignment], list[Placed]]:
    """Read `key.path=value` texts; values are YAML."""
    read: list[Assignment] = []
    problems: list[Placed] = []
    for order, text in enumerate(overrides, FIRST):
        label = f"override '{one_line(text, 100)}'"
        name, equals, value_text = text.partition("=")
        steps = re.sub(r"\[([0-9]+)\]", r".\1", name.strip()).split(".")
        if not equals or not all(re.fullmatch(r"[\w-]+", step) for step in steps):
            example = "must be key.path=value, as in stages.0.decompose.keep=0.6"
            found = [("invalid-override", example)]
        else:
            try:
                document = read_yaml(value_text)
                found = [(each.code, each.message) for _, each in document.problems]
                path = tuple(int(s) if re.fullmatch("[0-9]{1,9}", s) else s for s in steps)
                read.append(Assignment(order, label, path, document.value))
            except YamlError as error:
                found = [("invalid-yaml", f"the value is not valid YAML: {error.text}")]
        problems += [(order, Problem(code, "", message, label)) for code, message in found]
    return read, problems


def apply_overrides(
    recipe: dict[str, Any], assignments: Sequence[Assignment], shape: Shape, places: Places
) -> list[Placed]:
    """Set every value in `recipe`, in order, and its place in `places`; return what failed.

    Missing mappings are made, and short forms on the way are written out.
    """
    problems: list[Placed] = []
    for each in assignments:
        try:
            places.override(_set(recipe, each, shape), each.order, each.label)
        except _CannotApplyError as error:
            problem = Problem("invalid-override", "", str(error), each.label)
            problems.append((each.order, problem))
    return problems


def _set(recipe: dict[str, Any], assignment: Assignment, shape: Shape) -> Path:
    """Set the value; return the path of what is new, a made mapping or the value itself."""
    path = new = assignment.path
    here: Any = recipe
    at: Shape | None = shape
    for depth, step in enumerate(path[:-1], 1):
        _check_step(here, step, path[: depth - 1])
        at = _inside(at, here, step)
        inner = here.get(step) if isinstance(here, dict) else here[step]
        if isinstance(path[depth], str):
            if inner is None:
                inner = {}
                new = min(new, path[:depth], key=len)
            elif at is not None and at.short_key and _is_short_form(at, inner):
                inner = {at.short_key: inner}
            here[step] = inner
        here = inner
    _check_step(here, path[-1], path[:-1])
    here[path[-1]] = assignment.value
    return new


def _inside(at: Shape | None, value: Any, step: str | int) -> Shape | None:
    """Return what is allowed one step further, or None where the schema knows no such place."""
    if at is None:
        return None
    if isinstance(step, int):
        return next((part.items for part in at.parts if part.kind == "array"), None)
    mapping = at.mapping
    if mapping is None or not isinstance(value, dict):
        return None
    return mapping.variant(value).properties.get(step)


def _is_short_form(at: Shape, value: Any) -> bool:
    return any(part.holds(value) for part in at.parts if part.kind != "object")


def _check_step(here: Any, step: str | int, path: Path) -> None:
    name = dotted(path) or "the recipe"
    if isinstance(here, list):
        if isinstance(step, str):
            raise _CannotApplyError(f"{name} is a list; number the entry, as in {name}[0]")
        if step >= len(here):
            entries = "entry" if len(here) == 1 else "entries"
            text = f"{name} has {len(here)} {entries}, counted from 0; there is no {name}[{step}]"
            raise _CannotApplyError(f"{text}; override {name} as a whole")
    elif here is None:
        raise _CannotApplyError(f"there is no list at {name}; write it whole, {name}=[...]")
    elif not isinstance(here, dict):
        text = f"{name} is {got(here)}, nothing can be set inside it; override {name} itself"
        raise _CannotApplyError(text)
    elif isinstance(step, int):
        raise _CannotApplyError(f"{name} is a mapping, not a list; name one of its keys")
