"""What is allowed at one place of a recipe, read from the JSON Schema."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property
from math import inf
from re import search
from typing import Any

Schema = dict[str, Any]

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

    Several kinds of mapping at one place (the methods of a stage, the kinds of stages) are one part
    with `variants`: it has the keys of all of them, and `variant` tells which one a mapping means.

    Parameters
    ----------
    schema : Schema
        The schema of this place.
    root : Schema, optional
        The schema it is part of, which holds the definitions; itself if left out.

    Attributes
    ----------
    kind : str
        JSON type.
    options : list
        The allowed values, where they are few.
    words : str
        Name of the pattern of a string, such as "a size"; may be empty.
    tag : str or None
        The key whose value tells variants apart.
    """

    def __init__(self, schema: Schema, root: Schema | None = None) -> None:
        self.root = root = schema if root is None else root
        while "$ref" in schema:
            target = root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
            schema = target | {k: v for k, v in schema.items() if k != "$ref"}
        self.schema = schema
        self.kind = "object" if "oneOf" in schema else str(schema.get("type", "any"))
        self.options = list(schema.get("enum", [schema["const"]] if "const" in schema else []))
        self.words = str(schema.get("x-words", ""))
        self.tag: str | None = schema.get("discriminator", {}).get("propertyName")

    def _at(self, schema: Schema) -> "Shape":
        return Shape(schema, self.root)

    @cached_property
    def parts(self) -> list["Shape"]:
        """The alternatives, except null; mappings are gathered in one."""
        found = [part for each in self.schema.get("anyOf", []) for part in self._at(each).parts]
        if not found:
            return [] if self.kind == "null" else [self]
        objects = [part for part in found if part.kind == "object"]
        if len(objects) < 2:
            return found
        union = self._at({"oneOf": [part.schema for part in objects]})
        return [*(part for part in found if part.kind != "object"), union]

    @property
    def nullable(self) -> bool:
        """Whether null is allowed."""
        return any(
            each.get("type") == "null" for each in [self.schema, *self.schema.get("anyOf", [])]
        )

    @property
    def fixed(self) -> bool:
        """Whether only one value is allowed, so that the key can as well be left out."""
        return sum(len(part.options) or 2 for part in self.parts) + self.nullable == 1

    def holds(self, value: Any) -> bool:
        """Return whether a value has this part's type, whatever its range."""
        return isinstance(value, _KINDS[self.kind]) and (
            self.kind in ("boolean", "any") or not isinstance(value, bool)
        )

    def admits(self, value: Any) -> bool:
        """Return whether a value of this part's type is one of its options and fits its pattern."""
        if self.options:
            return value in self.options
        return not self.words or search(self.schema["pattern"], value) is not None

    def covers(self, number: float) -> bool:
        """Return whether a number is in this part's range."""
        get = self.schema.get
        inside: bool = get("minimum", -inf) <= number <= get("maximum", inf) and get(
            "exclusiveMinimum", -inf
        ) < number < get("exclusiveMaximum", inf)
        return inside

    @property
    def items(self) -> "Shape":
        """What is allowed for every entry of a list."""
        return self._at(self.schema.get("items", {}))

    @property
    def short_key(self) -> str | None:
        """The key that a bare value stands for."""
        places = [self, *(self._at(each) for each in self.schema.get("anyOf", []))]
        found = (place.schema.get("x-short-form") for place in places)
        return next((str(key) for key in found if key is not None), None)

    @property
    def mapping(self) -> "Shape | None":
        """The part that is a mapping."""
        return next((part for part in self.parts if part.kind == "object"), None)

    @cached_property
    def variants(self) -> list["Shape"]:
        """The kinds of mapping at this place."""
        return [self._at(each) for each in self.schema.get("oneOf", [])]

    @cached_property
    def properties(self) -> dict[str, "Shape"]:
        """The keys of a mapping; with variants, those of all of them."""
        if not self.variants:
            return {key: self._at(each) for key, each in self.schema.get("properties", {}).items()}
        found: dict[str, Shape] = {}
        for variant in self.variants:
            found = variant.properties | found  # the first variant describes a key
        order = dict.fromkeys(key for variant in self.variants for key in variant.properties)
        found = {key: found[key] for key in order}
        if self.tag is not None:
            tags = list(self.schema["discriminator"]["mapping"])
            found[self.tag] = self._at({"type": "string", "enum": tags})
        return found

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
            written = value.get(self.tag)
            name = None if written is None else closest(written, tags)
            return self._at({"$ref": tags[name]}) if name is not None else self

        def shared(variant: Shape) -> int:
            return sum(key in variant.properties for key in value)

        best = max(self.variants, key=shared, default=self)
        return best if best is not self and shared(best) else self
