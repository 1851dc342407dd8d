import pytest

from lrc.configs.axes import combinations, read_axes, split_values
from lrc.configs.errors import RecipeError
from lrc.configs.load import parse_recipe

RECIPE = """\
model: org/name
stages:
  - decompose: {method: kfac, keep: 0.8}
  - heal: {method: distill, steps: 3}
output: out
"""


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.9,0.8", ["0.9", "0.8"]),
        ("[a, b],[c]", ["[a, b]", "[c]"]),
        ("{c4: 0.5, self: 0.5}, c4", ["{c4: 0.5, self: 0.5}", "c4"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("it's,b", ["it's", "b"]),
        ("", [""]),
    ],
)
def test_commas_in_brackets_and_quotes_separate_nothing(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_names_tell_combinations_apart() -> None:
    axes = read_axes(["calibration.source=/a/x.txt,/b/x.txt", "stages.0.decompose.keep=0.5"])
    found = combinations(axes)
    assert [each.name for each in found] == ["source=a-x.txt", "source=b-x.txt"]
    assert found[0].overrides == ("calibration.source=/a/x.txt", "stages.0.decompose.keep=0.5")
    clash = combinations(read_axes(["a=x/y,x-y"]))
    assert [each.name for each in clash] == ["a=x-y", "a=x-y-2"]
    both = combinations(read_axes(["stages.0.decompose.keep=1,2", "stages.1.slice.keep=3,4"]))
    assert len({each.name for each in both}) == 4


def test_a_key_of_one_stage_needs_no_path() -> None:
    recipe = parse_recipe(RECIPE, name="r", overrides=["keep=0.5", "compensate.mix=0.2", "steps=7"])
    assert recipe.stages[0].options.keep == 0.5
    assert recipe.stages[0].options.compensate.mix == 0.2
    assert recipe.stages[1].options.steps == 7


def test_a_key_of_two_stages_needs_its_path() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE, name="r", overrides=["method=mixed"])
    (problem,) = caught.value.problems
    assert "can mean stages[0].decompose.method or stages[1].heal.method" in str(problem)


def test_an_unknown_key_is_reported_as_before() -> None:
    with pytest.raises(RecipeError, match="unknown key"):
        parse_recipe(RECIPE, name="r", overrides=["kep=0.5"])
