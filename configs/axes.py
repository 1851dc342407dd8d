"""Overrides with several values, `keep=0.9,0.8 method=kfac,mixed`, and their combinations."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from lrc.configs.errors import Problem, RecipeError
from lrc.configs.overrides import source_of

OPENING, CLOSING, QUOTES = "[{", "]}", "'\""
LONGEST_NAME = 100


@dataclass(frozen=True)
class Combination:
    """One value of every axis."""

    name: str
    """Of its folder; made of the values that vary."""
    values: dict[str, str]
    """Short key -> value as written, where it varies."""
    overrides: tuple[str, ...]


def read_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read `key=value,value` texts.

    Commas inside brackets and quotes belong to a value.

    Raises
    ------
    RecipeError
        If a key has no value, an empty one or the same one twice, or occurs twice.

    >>> read_axes(["keep=0.9,0.8", "components=[dense],[dense,sparse]"])
    {'keep': ['0.9', '0.8'], 'components': ['[dense]', '[dense,sparse]']}
    """
    axes: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        key, equals, rest = text.partition("=")
        key, values = key.strip(), split_values(rest)
        if not equals:
            problem = "must be key=value or key=value,value, as in keep=0.9,0.8"
        elif key in axes:
            problem = f"{key} is given twice; write all values after one {key}="
        elif not all(values):
            problem = f"must have a value before and after every comma, got '{rest}'; write it"
        elif len({*values}) < len(values):
            problem = "must not list a value twice; remove one"
        else:
            axes[key] = values
            continue
        problems.append(Problem("invalid-override", "", problem, source_of(text)))
    if problems:
        raise RecipeError(problems)
    return axes


def split_values(text: str) -> list[str]:
    """Split a text at the commas outside of brackets and quotes."""
    values, depth, quote, start = [], 0, "", True
    current = ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES and start:
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        elif character == "," and depth <= 0:
            values.append(current.strip())
            current, start = "", True
            continue
        start = character in OPENING + ",:" or (start and character.isspace())
        current += character
    return [*values, current.strip()]


def combinations(axes: dict[str, list[str]]) -> list[Combination]:
    """Return all combinations of the values, the last axis varying fastest.

    >>> [each.name for each in combinations({"seed": ["1"], "keep": ["0.9", "0.8"]})]
    ['keep=0.9', 'keep=0.8']
    """
    short = _short_keys([key for key, values in axes.items() if len(values) > 1])
    found: list[Combination] = []
    for chosen in product(*axes.values()):
        given = dict(zip(axes, chosen, strict=True))
        values = {name: given[key] for key, name in short.items()}
        overrides = tuple(f"{key}={value}" for key, value in given.items())
        found.append(Combination(folder_name(values, found), values, overrides))
    return found


def folder_name(values: dict[str, str], others: Sequence[Combination] = ()) -> str:
    """Return a name of a folder for a combination; a number distinguishes equal names."""
    parts = [f"{k}={_plain(v)}" for k, v in values.items()]
    name = "_".join(parts)[:LONGEST_NAME] or "run"
    number, taken = 1, {each.name for each in others}
    while (numbered := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return numbered


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of every key, or the whole key where these are equal."""
    last = {key: re.split(r"[.\[\]]+", key.strip("]"))[-1] for key in keys}
    parts = list(last.values())
    return {key: part if parts.count(part) == 1 else key for key, part in last.items()}
