"""The recipes that come with the package."""

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

from lrc.configs.errors import Problem, RecipeError
from lrc.configs.shape import closest


def names() -> list[str]:
    """Return the names of all shipped recipes, sorted; one in a folder is `folder/name`."""
    return sorted(_all())


def read(name: str) -> str:
    """Return the text of a shipped recipe; `.yaml` at the end of the name may be left out.

    Raises
    ------
    RecipeError
        If no recipe has that name.
    """
    recipes = _all()
    found = recipes.get(name.removesuffix(".yaml"))
    if found is None:
        near = closest(name, recipes)
        hint = f"did you mean '{near}'?" if near else "choose another."
        shipped = ", ".join(sorted(recipes))
        text = f"no shipped recipe is called '{name}'; {hint} Shipped: {shipped}"
        raise RecipeError([Problem("unknown-recipe", "", text)])
    return found.read_text(encoding="utf-8")


def summary(name: str) -> str:
    """Return what a shipped recipe is for, the comment in its first line."""
    return read(name).partition("\n")[0].removeprefix("#").strip()


def _all() -> dict[str, Traversable]:
    return dict(_below(files("lrc.recipes"), ""))


def _below(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _below(each, f"{prefix}{each.name}/")
        elif each.name.endswith(".yaml"):
            yield prefix + each.name.removesuffix(".yaml"), each
