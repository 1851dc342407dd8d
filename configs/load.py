"""From the YAML text of a recipe to a checked `Recipe`, with every problem at once."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from lrc.configs.errors import Problem, RecipeError
from lrc.configs.explain import explain
from lrc.configs.overrides import apply_override, read_overrides, source_of
from lrc.configs.places import problem_at
from lrc.configs.recipe import Recipe, recipe_schema
from lrc.configs.shape import Shape, closest
from lrc.configs.shipped import names
from lrc.configs.yaml_text import YamlError, read_yaml, write_yaml

MAX_BYTES = 1_000_000
"""A recipe is a page; what is larger is another file, named by mistake."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and what it was read from."""

    recipe: Recipe
    text: str
    """The file as given."""
    overrides: tuple[str, ...]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, apply `key.path=value` overrides in order, and check the result.

    Raises
    ------
    RecipeError
        With every problem of the file and of the overrides.
    """
    try:
        text = _read(Path(path))
    except RecipeError as error:
        raise RecipeError([*error.problems, *read_overrides(overrides)[1]]) from None
    recipe = parse_recipe(text, name=str(path), overrides=overrides)
    return LoadedRecipe(recipe, text, tuple(overrides))


def parse_recipe(text: str, *, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check the text of a recipe; `name` is what messages call it."""
    assignments, problems = read_overrides(overrides)
    try:
        document = read_yaml(text)
    except YamlError as error:
        where = f"{name}:{error.line}:{error.column}"
        problem = Problem("invalid-yaml", "", f"not valid YAML: {error.text}", where)
        raise RecipeError([problem, *problems]) from None
    if document.value is None:
        text = "is empty; `lrc recipes show svd-llm` prints a recipe"
        raise RecipeError([Problem("empty-recipe", "", text, name), *problems])
    shape = _recipe_shape()
    places = {(): name} | {path: f"{name}:{line}" for path, line in document.lines.items()}
    problems += [problem_at(*each, places) for each in document.problems]
    for each in assignments if isinstance(document.value, dict) else ():
        problems += apply_override(document.value, each, shape, places)
    try:
        recipe = Recipe.model_validate(document.value, strict=True)
    except ValidationError as error:
        problems += explain(error, document.value, shape, places)
    if problems:
        lines = sorted(set(document.lines.values()))
        sources = [name, *(f"{name}:{line}" for line in lines), *map(source_of, overrides)]
        problems.sort(key=lambda problem: sources.index(problem.source))
        raise RecipeError(problems)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe out in full; the text parses back to an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


@cache
def _recipe_shape() -> Shape:
    """Return what a recipe may contain; made once, because its schema takes a while."""
    return Shape(recipe_schema())


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) <= MAX_BYTES:
            return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        text = f"is larger than {MAX_BYTES:,} bytes; name the recipe, a short YAML text"
    except FileNotFoundError:
        text = f"no such file; {_what_instead(path)}"
    except IsADirectoryError:
        recipes = sorted(each.name for each in path.glob("*.y*ml"))
        inside = f"one of those inside: {', '.join(recipes)}" if recipes else "a recipe file"
        text = f"is a folder; name {inside}"
    except UnicodeDecodeError as error:
        text = f"is not UTF-8 text (byte {error.start}); a recipe is a YAML text, save it as UTF-8"
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        text = f"cannot be read: {reason}; check the path and its permissions"
    raise RecipeError([Problem("unreadable-recipe", str(path), text)])


def _what_instead(path: Path) -> str:
    beside = {each.name: each for each in path.parent.glob("*.y*ml")}
    same = next((name for name, each in beside.items() if each.stem == path.stem), None)
    shipped = str(path).removesuffix(".yaml")
    if same is None and shipped in names():
        return f"'{shipped}' is a shipped recipe, `lrc recipes copy {shipped}` puts it here"
    stems = {each.stem: name for name, each in beside.items()}
    near = same or stems.get(closest(path.stem, stems) or "")
    if near is not None:
        return f"did you mean '{path.with_name(near)}'?"
    return "check the path, or start from a shipped one: `lrc recipes list`"
