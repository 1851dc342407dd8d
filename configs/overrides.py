"""Overrides of single values: `stages.0.decompose.keep=0.6`, or `keep=0.6` if one stage has it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrc.configs.errors import Problem
from lrc.configs.places import Path, Places, dotted, one_line, problem_at
from lrc.configs.shape import Shape, closest
from lrc.configs.words import got
from lrc.configs.yaml_text import YamlError, read_yaml


@dataclass(frozen=True)
class Assignment:
    """One override, read; `source` is its name in messages."""

    source: str
    path: Path
    value: Any


def read_overrides(texts: Sequence[str]) -> tuple[list[Assignment], list[Problem]]:
    """Read `key.path=value` texts; values are YAML."""
    read: list[Assignment] = []
    problems: list[Problem] = []
    for text in texts:
        source = source_of(text)
        name, equals, value_text = text.partition("=")
        steps = re.sub(r"\[([0-9]+)\]", r".\1", name.strip()).split(".")
        if not equals or not all(re.fullmatch(r"[\w-]+", step) for step in steps):
            example = "must be key.path=value, as in stages.0.decompose.keep=0.6"
            problems.append(Problem("invalid-override", "", example, source))
            continue
        path = tuple(int(s) if re.fullmatch("[0-9]{1,9}", s) else s for s in steps)
        try:
            document = read_yaml(value_text)
        except YamlError as error:
            message = f"the value is not valid YAML: {error.text}"
            problems.append(Problem("invalid-yaml", "", message, source))
            continue
        problems += [problem_at(*each, {(): source}) for each in document.problems]
        read.append(Assignment(source, path, document.value))
    return read, problems


def source_of(override: str) -> str:
    """Return what messages call an override."""
    return f"override '{one_line(override, 100)}'"


def apply_override(
    recipe: dict[str, Any], assignment: Assignment, shape: Shape, places: Places
) -> list[Problem]:
    """Set a value in `recipe` and its place in `places`; return why that is impossible.

    Missing mappings are made, and short forms on the way are written out.
    """
    path, source = assignment.path, assignment.source
    places_of_key = option_paths(recipe, path[0], shape)
    if len(places_of_key) > 1:
        found = " or ".join(dotted((*place, *path[1:])) for place in places_of_key)
        return [Problem("invalid-override", "", f"can mean {found}; write it out", source)]
    if places_of_key:
        path = (*places_of_key[0], *path[1:])
    elif meant := _meant(recipe, path, shape):
        text = f"unknown key; did you mean '{meant}'?"
        return [Problem("unknown-key", "", text, source)]
    here: Any = recipe
    at: Shape | None = shape
    for depth, step in enumerate(path[:-1], 1):
        if problem := _obstacle(here, step, path[: depth - 1]):
            return [Problem("invalid-override", "", problem, source)]
        inner = here.get(step) if isinstance(here, dict) else here[step]
        at = at and at.inside(step)
        short_key = at and at.schema.get("x-short-form")
        if isinstance(path[depth], str):
            if inner is None:
                inner = {}
                places[path[:depth]] = source
            elif short_key and not isinstance(inner, dict):
                inner = {short_key: inner}
            here[step] = inner
        here = inner
    if problem := _obstacle(here, path[-1], path[:-1]):
        return [Problem("invalid-override", "", problem, source)]
    here[path[-1]] = assignment.value
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    places[path] = source
    return []


def option_paths(recipe: Mapping[str, Any], key: str | int, shape: Shape) -> list[Path]:
    """Return the places of a key of stages that is written without them.

    Parameters
    ----------
    recipe : mapping
        As read, with mistakes.
    key : str or int
        First step of an override. Keys at the top of a recipe have no other place.
    shape : Shape
        What is allowed in a recipe.

    Returns
    -------
    list of Path
        Those where the recipe has the key, or else those where it may be added.
    """
    written, allowed = list[Path](), list[Path]()
    stages = recipe.get("stages")
    if shape.inside(key) is None and isinstance(key, str) and isinstance(stages, list):
        for index, stage in enumerate(stages):
            for kind, options in stage.items() if isinstance(stage, dict) else ():
                at: Shape | None = shape
                for step in ("stages", index, kind, key):
                    at = at and at.inside(step)
                if at is not None and isinstance(options, dict):
                    allowed.append(("stages", index, kind, key))
                    if key in options:
                        written.append(("stages", index, kind, key))
    return written or allowed


def _meant(recipe: Mapping[str, Any], path: Path, shape: Shape) -> str | None:
    """Return the option of a stage that an unknown first step probably stands for."""
    top = shape.parts[-1].properties
    stages = recipe.get("stages")
    if path[0] in top or not isinstance(stages, list):
        return None
    options = set[str]()
    for index, stage in enumerate(stages):
        for kind in stage if isinstance(stage, dict) else ():
            if kind == path[0]:
                return dotted(("stages", index, *path))
            at: Shape | None = shape
            for step in ("stages", index, kind):
                at = at and at.inside(step)
            options |= at.parts[-1].properties.keys() if at is not None else set()
    meant = closest(path[0], [*top, *sorted(options)])
    return meant if meant in options else None


def _obstacle(here: Any, step: str | int, path: Path) -> str:
    name = dotted(path) or "the recipe"
    if here is None:
        return f"there is no list at {name}; write it whole, {name}=[...]"
    if isinstance(here, list) and isinstance(step, str):
        return f"{name} is a list; number the entry, as in {name}[0]"
    if isinstance(here, list) and isinstance(step, int) and step >= len(here):
        text = f"{name} is {got(here)}, counted from 0; there is no {name}[{step}]"
        return f"{text}; override {name} as a whole"
    if isinstance(here, dict) and isinstance(step, int):
        return f"{name} is a mapping, not a list; name one of its keys"
    if not isinstance(here, (dict, list)):
        return f"{name} is {got(here)}, nothing can be set inside it; override {name} itself"
    return ""
