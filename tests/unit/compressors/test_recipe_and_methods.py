"""What a recipe offers and what the solver takes are two tables; they agree."""

from typing import get_args

from lrc.compressors.methods.table import METHODS
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Decompose
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
    for name, model in OPTIONS.items():
        own = {
            key: field.default
            for key, field in model.model_fields.items()
            if key not in DecomposeBase.model_fields
        }
        assert ("group_size" in own) == METHODS[name].shared
        own.pop("forms", None)  # between which methods an allocation chooses
        for key in (
            "schemes",
            "embeddings",
            "head",
            "rounder",
            "order",
            "gauge",
        ):  # what is done to numbers afterwards
            own.pop(key, None)
        own.pop("group_size", None)  # which matrices are solved as one: not the metric's
        own.pop("ratio", None)  # which sizes a matrix may get
        options = {key: value for key, value in METHODS[name].options.items() if key != "seed"}
        assert own == options, name  # the seed is the recipe's
