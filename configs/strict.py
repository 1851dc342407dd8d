"""What all parts of a recipe have in common."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]


def _allow_short_form(schema: dict[str, Any], part: type["Strict"]) -> None:
    """Say in the JSON Schema what `Strict.short_form` says here."""
    if part.short_form is not None:
        kind, key = part.short_form
        short: dict[str, Any] = {"description": f"Short for `{{{key}: ...}}`."}
        if kind is str:
            short |= {"type": "string", "minLength": 1}
        else:
            short |= {"type": "array", "items": schema["properties"][key]["items"]}
        full = dict(schema)
        schema.clear()
        schema |= {"title": full["title"], "description": full["description"]}
        schema |= {"anyOf": [short, full], "x-short-form": key}


class Strict(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_allow_short_form,
    )

    short_form: ClassVar[tuple[type[str] | type[list[Any]], str] | None] = None
    """`(type, key)`: a bare value of that type stands for a mapping with that one key."""

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, value: Any) -> Any:
        if cls.short_form is not None and isinstance(value, cls.short_form[0]):
            return {cls.short_form[1]: value}
        return value
