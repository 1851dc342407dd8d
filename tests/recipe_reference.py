"""The page of all recipe keys, written from the schema: ``python -m tests.recipe_reference``."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lrc.configs.recipe import recipe_schema

PAGE = Path(__file__).parents[1] / "docs/recipe-keys.md"
HEAD = """\
# Recipe keys

All keys of recipes, with their types, defaults and meaning; [Recipes](recipes.md) explains how they
are used. A key without a default must be given. This page is written from the schema, which
`lrc schema` prints as JSON, by `python -m tests.recipe_reference`.
"""
TOP = ("model", "calibration", "evaluate")
PARTS = {
    "evaluate.perplexity[]": "Perplexity",
    "evaluate.tasks": "Tasks",
    "calibration.task": "CalibrationTask",
    "evaluate.task": "EvaluationTask",
    "evaluate.generations": "Generations",
    "evaluate.gates[]": "Gate",
    "compensate": "Compensate",
    "overrides[]": "Override",
    "low_rank_correction": "LowRankCorrection",
}
Schema = Mapping[str, Any]


def page() -> str:
    """Return the Markdown of the page."""
    schema = recipe_schema()
    definitions = schema["$defs"]
    parts = [HEAD, "## The recipe\n", _table(_properties(schema))]
    for name in TOP:
        parts += [f"## `{name}`\n", _table(_properties(definitions[name.capitalize()]))]
    parts += ["## Keys of several stages or entries\n"]
    for name, definition in PARTS.items():
        parts += [f"### `{name}`\n", _table(_properties(definitions[definition]))]
    for stage in schema["properties"]["stages"]["items"]["anyOf"]:
        parts += _stage(_resolve(stage, definitions), definitions)
    return "\n".join(parts)


def _stage(stage: Schema, definitions: Schema) -> Iterable[str]:
    """Yield the keys that all methods of a stage have, and those of every method."""
    ((kind, options),) = stage["properties"].items()
    choices = [_resolve(each, definitions) for each in options.get("oneOf", [options])]
    yield f"## `{kind}`\n"
    if len(choices) == 1:
        yield _table(_properties(choices[0]))
        return
    methods = {
        each["properties"]["method"]["const"]: {
            key: row for key, row in _properties(each).items() if key != "method"
        }
        for each in choices
    }
    first, *others = methods.values()
    common = {
        key: row for key, row in first.items() if all(row == other.get(key) for other in others)
    }
    yield "All methods have these keys:\n"
    yield _table(common)
    for each in choices:
        method = each["properties"]["method"]
        yield f"### `{kind}.method: {method['const']}`\n"
        yield f"{method['description']}\n"
        rows = {key: row for key, row in methods[method["const"]].items() if key not in common}
        if rows:
            yield _table(rows)


def _properties(schema: Schema) -> dict[str, tuple[str, str, str]]:
    """Return type, default and meaning of every key."""
    if "properties" not in schema:  # a short form, or the mapping
        schema = next(each for each in schema["anyOf"] if "properties" in each)
    required = schema.get("required", ())
    return {
        key: (_type(value), "" if key in required else _default(value), _meaning(value))
        for key, value in schema["properties"].items()
    }


def _resolve(schema: Schema, definitions: Schema) -> Schema:
    name = schema.get("$ref")
    return schema if name is None else definitions[name.removeprefix("#/$defs/")]


def _type(schema: Schema) -> str:
    """Return the values of a key in words."""
    if "$ref" in schema:
        return "mapping"
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{_scalar(each)}`" for each in values)
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices is not None:
        words = dict.fromkeys(_type(each) for each in choices if each.get("type") != "null")
        return " or ".join(words)
    if "x-words" in schema:
        return str(schema["x-words"])
    kind = schema.get("type")
    if kind == "array":
        return f"list of: {_type(schema['items'])}"
    words = {"object": "mapping", "string": "text", "integer": "whole number", "boolean": "boolean"}
    return words.get(kind, "number") + _range(schema)


def _range(schema: Schema) -> str:
    """Return the limits of a number in words."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if schema.get("type") == "integer" and above is not None:
        low, above = above + 1, None
    bounds = [
        f"> {above:g}" if above is not None else f">= {low:g}" if low is not None else "",
        f"<= {high:g}" if high is not None else "",
        f"< {below:g}" if below is not None and below < 2**53 else "",
    ]
    return " ".join(["", ", ".join(filter(None, bounds))]).rstrip()


def _default(schema: Schema) -> str:
    value = schema.get("default")
    if value in (None, ""):
        return "left out"
    return "see below" if isinstance(value, dict) else f"`{_scalar(value)}`"


def _scalar(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _meaning(schema: Schema) -> str:
    return " ".join(schema.get("description", "").split()).replace("|", "\\|")


def _table(rows: Mapping[str, tuple[str, str, str]]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {' | '.join(row)} |" for key, row in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
