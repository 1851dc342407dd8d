"""The wording of representative planning problems: what is wrong, what is allowed, what to do."""

from collections.abc import Callable
from typing import Any

import pytest

from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import RecipeError

TWO_OF_FOUR = {"method": "sparse", "pattern": "2:4", "ignore": ["*tiny"]}
MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern without a match": (
        {"keep": 0.5, "ignore": ["*.q_porj"]},
        "stages[0].decompose.ignore: the pattern '*.q_porj' matches no linear layer; did you mean "
        "'*.q_proj'? Names look like layers.0.attn.q_proj; the last parts are q_proj, k_proj, "
        "up_proj, tiny",
    ),
    "a rank that does not exist": (
        {"keep": 0.5, "overrides": [{"match": "*.k_proj", "rank": 17}]},
        "stages[0].decompose.overrides[0].rank: must be in [1, 16] for layers.0.attn.k_proj "
        "[16, 64], got 17; lower rank or list the layer under 'ignore' (and 1 more of this kind)",
    ),
    "a fraction below the one size of a pattern": (
        {**TWO_OF_FOUR, "keep": 0.5, "allocation": "uniform"},
        "stages[0].decompose.keep: must be at least 0.563 of the bits for layers.0.attn.k_proj "
        "[16, 64] with pattern 2:4, got 0.5; raise keep or list the layer under 'ignore' (and 5 "
        "more of this kind)",
    ),
    "a budget below the one size of a pattern": (
        {**TWO_OF_FOUR, "keep": 0.5},
        "stages[0].decompose.keep: must be at least 0.5627 of the bits, the cost of the cheapest "
        "candidates, got 0.5; raise keep",
    ),
    "inputs that a pattern does not divide": (
        {**TWO_OF_FOUR, "keep": 0.8, "ignore": []},
        "stages[0].decompose.pattern: layers.0.tiny: pattern 2:4 needs a number of inputs "
        "divisible by 4, got a weight [2, 2]; list the layer under 'ignore' or use pattern: "
        "unstructured (and 1 more of this kind)",
    ),
    "a floor above the one size of a pattern": (
        {**TWO_OF_FOUR, "keep": 0.8, "min_keep": 0.7},
        "stages[0].decompose.keep: must be at least 1 of the bits, the cost of the cheapest "
        "candidates, got 0.8; raise keep, lower 'min_keep' (0.7)",
    ),
    "atoms that leave no room for coefficients": (
        {"method": "dictionary", "keep": 0.5, "ratio": [2, 70], "targets": ["*q_proj"]},
        "stages[0].decompose.ratio: must be in [1, 61], above which the smallest dictionaries are "
        "as large as the weights of this stage, got 70; lower it",
    ),
    "nothing that becomes smaller": (
        {"keep": 1.0},
        "stages: every targeted matrix stays dense, so nothing would become smaller; lower 'keep'",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_name_the_key_the_allowed_and_the_found_value_and_a_remedy(
    plan_of: Callable[..., Plan], case: str
) -> None:
    stage, expected = MESSAGES[case]
    with pytest.raises(RecipeError) as caught:
        plan_of(stage)
    assert list(map(str, caught.value.problems)) == [expected]


@pytest.mark.parametrize("method", ["basis-sharing", "cospadi"])
def test_layers_of_unequal_shapes_are_named_with_both_remedies(
    plan_of: Callable[..., Plan], method: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(
            {"method": method, "keep": 0.5, "layers_per_group": 2},
            layers=3,
            other={"layers.1.mlp.up_proj": (80, 64)},
        )
    assert list(map(str, caught.value.problems)) == [
        "stages[0].decompose.layers_per_group: layers that share a factor must have one shape, got "
        "layers.0.mlp.up_proj [96, 64] and layers.1.mlp.up_proj [80, 64]; use a separate stage for "
        "each shape, or list one of them under 'ignore' (and 1 more of this kind)"
    ]
