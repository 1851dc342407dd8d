"""The base of all option models, and types that several of them use."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Damp = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Fraction of the mean diagonal of the input second moment that is added to its "
        "diagonal.",
    ),
]


def _complete_schema(schema: dict[str, Any], part: type["Strict"]) -> None:
    """Add to the JSON Schema what the short form and the docstring of a model say."""
    method = schema["properties"].get("method")
    if method is not None:
        method.setdefault("description", schema["description"])
    if part.short_form is not None:
        key = part.short_form[1]
        same = ("type", "minLength", "items")
        value = schema["properties"][key]
        value = value.get("anyOf", [value])[0]  # only a plain value can be a short form
        short = {name: rule for name, rule in value.items() if name in same}
        short["description"] = part.short_words or f"Short for `{{{key}: ...}}`."
        full = dict(schema)
        schema.clear()
        schema |= {"title": full["title"], "description": full["description"]}
        schema |= {"anyOf": [short, full], "x-short-form": key}


def repeated(names: list[str]) -> list[str]:
    """Return the names that occur more than once, sorted."""
    return sorted({name for name in names if names.count(name) > 1})


class Strict(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_complete_schema,
    )

    short_form: ClassVar[tuple[type[str] | type[list[Any]], str] | None] = None
    """`(type, key)`: a bare value of that type stands for a mapping with that one key."""
    short_words: ClassVar[str | None] = None
    """Description of the short form where it stands for more than one key."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        if cls.short_form is not None and isinstance(value, cls.short_form[0]):
            return {cls.short_form[1]: value}
        return value
