"""What is allowed at one place of a recipe, read from the JSON Schema."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property
from math import inf
from re import search
from typing import Any

Schema = dict[str, Any]

_SHORT = "x-short-form"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "any": object,
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
    """One place of the schema.

    `parts` are the alternatives without null. Several kinds of mapping at one place (the methods of
    a stage, the kinds of stages) are one part with `variants`: it has the keys of all of them, and
    `variant` tells which one a given mapping means.

    Parameters
    ----------
    schema : Schema
        The schema of this place.
    root : Schema, optional
        The schema it is part of, which holds the definitions; itself if left out.
    """

    def __init__(self, schema: Schema, root: Schema | None = None) -> None:
        self.root = root = schema if root is None else root
        self.schema = schema
        while "$ref" in self.schema:
            target = root["$defs"][self.schema["$ref"].rsplit("/", 1)[-1]]
            self.schema = target | {k: v for k, v in self.schema.items() if k != "$ref"}

    def _at(self, schema: Schema) -> "Shape":
        return Shape(schema, self.root)

    @cached_property
    def parts(self) -> list["Shape"]:
        """The alternatives, except null; mappings are gathered in one."""
        found: list[Shape] = []
        for each in self.schema.get("anyOf", []):
            found += self._at(each).parts
        if not found:
            return [] if self.schema.get("type") == "null" else [self]
        objects = [part for part in found if part.kind == "object"]
        if len(objects) < 2:
            return found
        union = self._at({"oneOf": [part.schema for part in objects]})
        return [*(part for part in found if part.kind != "object"), union]

    @property
    def nullable(self) -> bool:
        """Whether null is allowed."""
        alternatives = [self.schema, *self.schema.get("anyOf", [])]
        return any(each.get("type") == "null" for each in alternatives)

    @property
    def kind(self) -> str:
        """JSON type of this part."""
        return "object" if "oneOf" in self.schema else str(self.schema.get("type", "any"))

    def holds(self, value: Any) -> bool:
        """Whether a value is of this part's kind, whatever its range."""
        return isinstance(value, _KINDS[self.kind]) and (
            self.kind in ("boolean", "any") or not isinstance(value, bool)
        )

    def covers(self, number: float) -> bool:
        """Whether a number is in this part's range."""
        low, high = self.schema.get("minimum", -inf), self.schema.get("maximum", inf)
        above = self.schema.get("exclusiveMinimum", -inf)
        below = self.schema.get("exclusiveMaximum", inf)
        inside: bool = low <= number <= high and above < number < below
        return inside

    @property
    def words(self) -> str:
        """What a text of this part's pattern is called; empty without a pattern that has a name."""
        return str(self.schema.get("x-words", ""))

    def admits(self, value: Any) -> bool:
        """Whether a value of this part's kind is one of its options and of its named pattern."""
        if self.options:
            return value in self.options
        return not self.words or search(self.schema["pattern"], value) is not None

    @property
    def options(self) -> list[Any]:
        """The allowed values, where they are few."""
        constant = [self.schema["const"]] if "const" in self.schema else []
        return list(self.schema.get("enum", constant))

    @property
    def fixed(self) -> bool:
        """Whether there is but one value, so that the key can as well be left out."""
        alternatives = sum(len(part.options) or 2 for part in self.parts)
        return alternatives + self.nullable == 1

    @property
    def items(self) -> "Shape":
        """What is allowed for every entry of a list."""
        return self._at(self.schema.get("items", {}))

    @property
    def short_key(self) -> str | None:
        """The key that a bare value stands for."""
        places = [self, *(self._at(each) for each in self.schema.get("anyOf", []))]
        return next((str(p.schema[_SHORT]) for p in places if _SHORT in p.schema), None)

    @property
    def mapping(self) -> "Shape | None":
        """The part that is a mapping."""
        return next((part for part in self.parts if part.kind == "object"), None)

    @cached_property
    def variants(self) -> list["Shape"]:
        """The kinds of mapping at this place."""
        return [self._at(each) for each in self.schema.get("oneOf", [])]

    @property
    def tag(self) -> str | None:
        """The key whose value tells the variants apart."""
        name = self.schema.get("discriminator", {}).get("propertyName")
        return name if name is None else str(name)

    @cached_property
    def properties(self) -> dict[str, "Shape"]:
        """The keys of a mapping; of all variants, if it has some."""
        if not self.variants:
            return {key: self._at(each) for key, each in self.schema.get("properties", {}).items()}
        every = {key: each for v in self.variants[::-1] for key, each in v.properties.items()}
        order = [key for v in self.variants for key in v.properties]
        found = {key: every[key] for key in dict.fromkeys(order)}
        if self.tag is not None:
            tags = list(self.schema["discriminator"]["mapping"])
            found[self.tag] = self._at({"type": "string", "enum": tags})
        return found

    @property
    def any_key(self) -> "Shape | None":
        """What is allowed under a key that is none of the `properties`, if such keys are."""
        rest = self.schema.get("additionalProperties", False)
        return self._at(rest) if isinstance(rest, dict) else None

    @property
    def required(self) -> list[str]:
        """The keys that must be given; with variants, those that every one of them needs."""
        if not self.variants:
            return list(self.schema.get("required", []))
        first, *others = self.variants
        return [key for key in first.required if all(key in v.required for v in others)]

    def variant(self, value: Mapping[str, Any]) -> "Shape":
        """Return the variant that a mapping means, or this shape if that cannot be told."""
        if self.tag is not None:
            tags: Schema = self.schema["discriminator"]["mapping"]
            said = value.get(self.tag)
            name = None if said is None else closest(said, tags)
            return self._at({"$ref": tags[name]}) if name is not None else self
        shared = {id(v): sum(key in v.properties for key in value) for v in self.variants}
        best = max(self.variants, key=lambda v: shared[id(v)], default=self)
        return best if shared.get(id(best)) else self
