"""Every rejected value is explained, for any model; test_error_messages.py has the wording."""

import random
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from lrc.configs import shipped
from lrc.configs.decompose import Compensate
from lrc.configs.explain import explain
from lrc.configs.load import parse_recipe
from lrc.configs.recipe import STAGE_MODELS, Recipe, recipe_schema
from lrc.configs.shape import Shape
from lrc.configs.strict import Strict
from lrc.configs.yaml_text import read_yaml

GOOD = """\
model: org/name
stages:
  - decompose: {method: svd-llm, keep: 0.8}
output: out
"""


def found(model: type[BaseModel], value: Any) -> list[tuple[str, str]]:
    """Return the code and the key path of everything that is wrong with a value."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value, strict=True)
    shape = Shape(model.model_json_schema())
    return [(each.code, each.where) for each in explain(caught.value, value, shape, {(): ""})]


def test_an_empty_mapping_requests_compensation_with_its_defaults() -> None:
    text = GOOD.replace("0.8", "0.8, compensate: {}")
    assert parse_recipe(text, name="recipe.yaml").stages[0].decompose.compensate == Compensate()
    assert parse_recipe(GOOD, name="recipe.yaml").stages[0].decompose.compensate is None


def test_half_of_the_groups_are_removed_by_default() -> None:
    text = GOOD.replace("decompose: {method: svd-llm, keep: 0.8}", "quantize: {METHOD}")
    for method, sparsity in (("gqsa, group_size: 8", 0.5), ("gptq", None)):
        stage = parse_recipe(text.replace("METHOD", f"method: {method}"), name="recipe.yaml").stages
        assert stage[0].quantize.sparsity == sparsity


def test_a_budget_can_come_from_a_plan_with_or_without_a_fraction() -> None:
    for budget in ("plan: a.json", "keep: 0.8, plan: a.json", "size: 1.5 GiB"):
        text = GOOD.replace("keep: 0.8", budget)
        parse_recipe(text, name="recipe.yaml")


class QuantizeForTest(Strict):
    bits: int


class QuantizeStageForTest(Strict):
    quantize: QuantizeForTest


DecomposeStage: Any = STAGE_MODELS["decompose"]


class TwoKinds(Strict):
    stages: list[DecomposeStage | QuantizeStageForTest]


def test_a_second_kind_of_stage_needs_no_change_here() -> None:
    text = """
    stages:
    - {decompose: {method: svd, keep: 0.8}}
    - {quantize: {bits: 4}}
    - {quantise: {bits: x}}
    - {quantize: {bit: 4}}
    - {decompose: {method: svd, keep: 0.8}, quantize: {bits: 4}}
    - {}
    - 3
    """
    assert found(TwoKinds, read_yaml(text).value) == [
        ("unknown-key", "stages[2].quantise"),
        ("wrong-type", "stages[2].quantise.bits"),
        ("unknown-key", "stages[3].quantize.bit"),
        ("misplaced-key", "stages[4].quantize"),
        ("missing-key", "stages[5]"),
        ("wrong-type", "stages[6]"),
    ]


class Patterned(Strict):
    color: Annotated[str, Field(pattern="^#")]
    other: int


class Even(Strict):
    number: Annotated[int, Field(multiple_of=2)]


def test_a_rule_unknown_here_still_gets_a_sentence() -> None:
    assert found(Even, {"number": 3}) == [("invalid-value", "number")]
    value = {"color": "red", "other": "x"}
    assert found(Patterned, value) == [("unknown-value", "color"), ("wrong-type", "other")]


class Choices(Strict):
    bits: Literal[3, 4, 8]
    rank: Literal["auto"] | PositiveInt = "auto"


def test_options_that_are_numbers_are_explained() -> None:
    good: dict[str, Any] = {"bits": 4, "rank": 8}
    Choices.model_validate(good, strict=True)
    changes: list[tuple[dict[str, Any], str, str]] = [
        ({"bits": 5}, "unknown-value", "bits"),
        ({"bits": "4"}, "wrong-type", "bits"),
        ({"rank": "autp"}, "unknown-value", "rank"),
        ({"rank": 0}, "out-of-range", "rank"),
    ]
    for change, code, where in changes:
        assert found(Choices, good | change) == [(code, where)]


def spoilt(value: Any, random_: random.Random) -> Any:
    """Replace, rename or remove something, somewhere."""
    junk: list[Any] = [
        None,
        True,
        0,
        -1,
        1.5,
        float("nan"),
        "",
        "svd",
        "x",
        [],
        ["a"],
        [{}],
        {},
        {"keep": 2},
    ]
    if random_.random() < 0.1 or not isinstance(value, (dict, list)) or not value:
        return random_.choice(junk)
    if isinstance(value, list):
        at = random_.randrange(len(value))
        return [spoilt(each, random_) if i == at else each for i, each in enumerate(value)]
    key = random_.choice(list(value))
    rest = {other: each for other, each in value.items() if other != key}
    if random_.random() < 0.2:
        return rest
    new = key[:-1] if random_.random() < 0.2 else key
    return rest | {new: spoilt(value[key], random_)}


def test_every_rejected_value_has_a_specific_code() -> None:
    random_ = random.Random(0)
    shape = Shape(recipe_schema())
    starts = [
        parse_recipe(shipped.read(name), name=name).model_dump(mode="json")
        for name in ("svd-llm", "kfac", "basis-sharing")
    ]
    rejected = 0
    for _ in range(2000):
        value = spoilt(random_.choice(starts), random_)
        if random_.random() < 0.5 and isinstance(value, dict):
            value = spoilt(value, random_)
        try:
            Recipe.model_validate(value, strict=True)
        except ValidationError as error:
            rejected += 1
            codes = [each.code for each in explain(error, value, shape, {(): ""})]
            assert codes, value
            assert "invalid-value" not in codes, value
    assert rejected > 1000
