"""What a recipe offers and what the solvers take are two tables; they agree."""

from typing import get_args

from lrc.compressors.methods.table import METHODS
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Decompose
from lrc.configs.quantize import Quantize

QUANTIZATION = set(get_args(Quantize.model_fields["method"].annotation))
OPTIONS = {
    name: model
    for model in get_args(get_args(Decompose)[0])
    for name in get_args(model.model_fields["method"].annotation)
}
ALLOCATION = {"components", "storage", "ratio", "layers_per_group", "experts_per_group"}
"""Which components and sizes a weight may get, and which weights are solved together."""
AFTERWARDS = {"schemes", "embeddings", "lm_head", "quantizer", "act_order", "balance", "serve"}
"""How numbers are quantized."""


def test_every_method_has_one_model_of_options_and_every_model_a_method() -> None:
    assert len(OPTIONS) == len(get_args(get_args(Decompose)[0])) > 5
    assert len(QUANTIZATION) == 3
    assert set(OPTIONS) | QUANTIZATION == set(METHODS)


def test_options_are_the_same_in_both() -> None:
    for name, model in OPTIONS.items():
        own = model.model_fields.keys() - DecomposeBase.model_fields.keys()
        assert ("layers_per_group" in own) == METHODS[name].shares_factors
        # The seed is the recipe's.
        assert own - ALLOCATION - AFTERWARDS == {*METHODS[name].options} - {"seed"}, name


def test_every_option_reaches_the_solver_with_the_value_of_the_recipe() -> None:
    for name, model in OPTIONS.items():
        method = METHODS[name]
        recipe = model.model_validate({"method": name, "keep": 0.5}).solver_options | {"seed": 3}
        selected = method.select(recipe)
        assert selected == {option: recipe[option] for option in method.options}
