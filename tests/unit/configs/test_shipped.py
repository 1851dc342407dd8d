from importlib.resources import files

import pytest

from lrc.configs import shipped
from lrc.configs.errors import RecipeError
from lrc.configs.load import dump_recipe, parse_recipe
from lrc.configs.recipe import recipe_schema
from lrc.configs.shape import Shape

NAMES = shipped.names()


def test_every_recipe_file_is_shipped_under_its_own_name() -> None:
    assert {"demo", "offline", "size", "welore"} <= set(NAMES)
    assert list(files("lrc.recipes").iterdir())  # the folder that is searched


def test_every_method_has_a_recipe_of_its_name() -> None:
    stage = Shape(recipe_schema()).properties["stages"].inside(0)
    assert stage is not None
    stages = stage.parts[-1].properties
    assert set(stages) == {"slice", "decompose", "quantize", "heal"}
    for kind, methods in stages.items():
        for method in methods.properties["method"].options:
            recipe = parse_recipe(shipped.read(method), name=method)
            stage = recipe.stages[-1 if kind == "heal" else 0]  # healing needs a loss to heal
            assert getattr(stage, kind).method == method


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_does_something(name: str) -> None:
    recipe = parse_recipe(shipped.read(name), name=name)
    assert recipe.stages
    assert recipe.evaluate.perplexity or recipe.evaluate.tasks.names
    assert recipe.output == f"runs/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_survives_being_written_out(name: str) -> None:
    recipe = parse_recipe(shipped.read(name), name=name)
    written = dump_recipe(recipe)
    assert parse_recipe(written, name=name) == recipe
    assert dump_recipe(parse_recipe(written, name=name)) == written


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_opens_with_its_purpose_and_its_command(name: str) -> None:
    lines = shipped.read(name).splitlines()
    assert shipped.summary(name).endswith(".")
    assert lines[0] == f"# {shipped.summary(name)}"
    assert lines[1] == "#"
    assert lines[2].startswith("#   ")
    assert f"lrc compress {'recipes/' if name == 'demo' else ''}{name}.yaml" in lines[2]


def test_summaries_tell_recipes_apart() -> None:
    assert len({shipped.summary(name) for name in NAMES}) == len(NAMES)


def test_the_ending_of_the_file_may_be_given() -> None:
    assert shipped.read("svd.yaml") == shipped.read("svd")


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="no shipped recipe is called 'svdllm'; did you mean"):
        shipped.read("svdllm")


@pytest.mark.parametrize("name", ["zzz", "", "../configs/recipe", "/etc/hostname"])
def test_a_hopeless_name_gets_the_list(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        shipped.read(name)
    (problem,) = caught.value.problems
    assert problem.code == "unknown-recipe"
    assert problem.message.endswith(f"choose another. Shipped: {', '.join(NAMES)}")
