"""What is allowed at one place of a recipe, read from the JSON Schema."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property
from typing import Any

Schema = dict[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_LIMITS = {
    "minimum": (">=", operator.ge),
    "exclusiveMinimum": (">", operator.gt),
    "maximum": ("<=", operator.le),
    "exclusiveMaximum": ("<", operator.lt),
}


def closest(word: object, allowed: Iterable[str]) -> str | None:
    """Return the allowed word that `word` was probably meant to be.

    >>> closest("svdllm", ["svd", "svd-llm"])
    'svd-llm'
    """
    by_lower = {each.lower(): each for each in allowed}
    found = get_close_matches(str(word).lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


class Shape:
    """One place of a schema; `root`, by default the same, is the schema with the definitions.

    Several kinds of mapping at one place (the methods of a stage, the kinds of stages) are one part
    with the keys of all of them; `variant` tells which one a mapping means.
    """

    def __init__(self, schema: Schema, root: Schema | None = None) -> None:
        self.root = root = schema if root is None else root
        while "$ref" in schema:
            target = root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
            schema = target | {k: v for k, v in schema.items() if k != "$ref"}
        self.schema = schema
        self.kind = "object" if "oneOf" in schema else str(schema.get("type"))
        self.options = list(schema.get("enum", [schema["const"]] if "const" in schema else []))
        self.tag: str | None = schema.get("discriminator", {}).get("propertyName")

    def _at(self, schema: Schema) -> "Shape":
        return Shape(schema, self.root)

    @cached_property
    def parts(self) -> list["Shape"]:
        """The alternatives: null first, and mappings gathered in one at the end."""
        if "anyOf" not in self.schema:
            return [self]
        found = [part for each in self.schema["anyOf"] for part in self._at(each).parts]
        found.sort(key=lambda part: (part.kind != "null", part.kind == "object"))
        mappings = [part.schema for part in found if part.kind == "object"]
        if len(mappings) > 1:
            found[-len(mappings) :] = [self._at({"oneOf": mappings})]
        return found

    def holds(self, value: Any) -> bool:
        """Return whether a value has this part's type, whatever its range."""
        return type(value) in _TYPES.get(self.kind, (type(value),))

    def admits(self, value: Any) -> bool:
        """Return whether a value of this part's type is one of its options and fits its pattern."""
        if self.options:
            return value in self.options
        return "pattern" not in self.schema or bool(re.search(self.schema["pattern"], value))

    @property
    def limits(self) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
        """The range of a number: signs such as `<=`, their meaning, and the other side."""
        limits = ((sign, within, self.schema.get(key)) for key, (sign, within) in _LIMITS.items())
        return [(sign, within, limit) for sign, within, limit in limits if limit is not None]

    def covers(self, value: Any) -> bool:
        """Return whether a value of this part's type is in its range, or long enough."""
        if isinstance(value, (str, list)):
            return bool(value) or not {"minLength", "minItems"} & self.schema.keys()
        within_limits = all(within(value, limit) for _, within, limit in self.limits)
        return within_limits and (not isinstance(value, float) or math.isfinite(value))

    @cached_property
    def properties(self) -> dict[str, "Shape"]:
        """The keys of a mapping; with variants, those of all of them."""
        found: dict[str, Shape] = {}
        for each in map(self._at, self.schema.get("oneOf", [self.schema])):
            for key, inner in each.schema.get("properties", {}).items():
                found.setdefault(key, self._at(inner))
        if self.tag is not None:
            tags = list(self.schema["discriminator"]["mapping"])
            found[self.tag] = self._at({"type": "string", "enum": tags})
        return found

    @property
    def entries(self) -> "Shape | None":
        """What is allowed under the keys of a mapping whose keys are free; None if they are not."""
        schema = self.schema.get("additionalProperties")
        return self._at(schema) if isinstance(schema, dict) else None

    def variant(self, value: Mapping[str, Any]) -> "Shape":
        """Return the variant that a mapping means, or this shape if that cannot be told."""
        if self.tag is not None:
            tags: Schema = self.schema["discriminator"]["mapping"]
            near = closest(value.get(self.tag), tags)
            return self if near is None else self._at({"$ref": tags[near]})
        variants = map(self._at, self.schema.get("oneOf", [self.schema]))
        shared = {each: len(value.keys() & each.properties) for each in variants}
        best = max(shared, key=shared.__getitem__)
        return best if shared[best] or len(shared) == 1 else self

    def names(self, key: str) -> bool:
        """Return whether a mapping here, or an entry of a list here, has this key by name."""
        entry = self.inside(0)
        return key in self.parts[-1].properties or (entry is not None and entry.names(key))

    def inside(self, step: str | int) -> "Shape | None":
        """Return what is allowed under a key or for a list's entries; None if nothing is."""
        if isinstance(step, str):
            last = self.parts[-1]
            return last.properties.get(step) or last.entries
        items = (part.schema["items"] for part in self.parts if part.kind == "array")
        return next(map(self._at, items), None)
