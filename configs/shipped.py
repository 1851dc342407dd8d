"""The recipes that come with the package."""

from importlib.resources import files
from importlib.resources.abc import Traversable

from lrc.configs.errors import Problem, RecipeError
from lrc.configs.shape import closest


def names() -> list[str]:
    """Return the names of all shipped recipes, sorted."""
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
    recipes = (each for each in files("lrc.recipes").iterdir() if each.name.endswith(".yaml"))
    return {each.name.removesuffix(".yaml"): each for each in recipes}
