"""What a recipe offers and what the solver takes are two tables; they agree."""

from typing import get_args

from lrc.compressors.methods.table import METHODS
from lrc.configs.decompose_methods import Decompose, LowRank
from lrc.configs.quantize import Quantize

ROUNDING = set(get_args(Quantize.model_fields["method"].annotation))
OPTIONS = {
    name: model
    for model in get_args(get_args(Decompose)[0])
    for name in get_args(model.model_fields["method"].annotation)
}


def test_every_method_has_one_model_of_options_and_every_model_a_method() -> None:
    assert len(OPTIONS) == len(get_args(get_args(Decompose)[0])) > 5
    assert len(ROUNDING) == 3
    assert set(OPTIONS) | ROUNDING == set(METHODS)


def test_options_and_defaults_are_the_same_in_both() -> None:
    planned = {  # by planning, not by the method: what a matrix becomes, and its quantization
        *LowRank.model_fields,
        *("components", "schemes", "embeddings", "lm_head", "quantizer", "act_order", "balance"),
        *("layers_per_group", "ratio"),
    }
    for name, model in OPTIONS.items():
        fields = model.model_fields
        assert ("layers_per_group" in fields) == METHODS[name].shared
        own = {key: field.default for key, field in fields.items() if key not in planned}
        options = {key: value for key, value in METHODS[name].options.items() if key != "seed"}
        assert own == options, name  # the seed is the recipe's
