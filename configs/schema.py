"""The JSON Schema of a recipe, for editors; error sentences are written from it too."""

from typing import Any

from lrc.configs.recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, short forms included."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "lrc recipe",
    }
