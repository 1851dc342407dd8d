"""Models that differ from what their config.json describes: other shapes, biases and norms."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.residual_basis import (
    BIASES,
    NORMS,
    add_biases_,
    find_module,
    place_norms_,
)

SHAPES = "shapes"
TABLES = (SHAPES, BIASES, NORMS)
"""Keys of a config's ``quantization_config`` that state how the model differs from the config."""
ShapeTable = Mapping[str, Sequence[int]]
"""Full name of a linear layer or an embedding -> shape of its weight."""


def tables_of(config: Any) -> dict[str, Any]:
    """Return the tables that a config contains, by their keys; most contain none."""
    block = getattr(config, "quantization_config", None) or {}
    found = block if isinstance(block, Mapping) else vars(block)
    return {key: found[key] for key in TABLES if found.get(key)}


def rebuild_(model: Any) -> None:
    """Change a model without weights as the tables in its config state.

    Raises
    ------
    ValueError
        If the tables do not fit the model.
    """
    tables = tables_of(model.config)
    resize_(model, tables.get(SHAPES, {}))
    add_biases_(model, tables.get(BIASES, []))
    place_norms_(model, tables.get(NORMS, {}))


@torch.no_grad()
def resize_(model: nn.Module, shapes: ShapeTable) -> dict[str, list[int]]:
    """Give linear layers and embeddings smaller, uninitialized weights on the same devices.

    Returns
    -------
    dict of str to list of int
        The previous shapes.

    Raises
    ------
    ValueError
        If there is no such layer or a shape is larger than before; nothing is changed then.
    """
    modules = {name: _resizable(model, name) for name in shapes}
    before = {name: list(module.weight.shape) for name, module in modules.items()}
    for name, shape in shapes.items():
        if any(new > old for new, old in zip(shape, before[name], strict=True)):
            raise ValueError(
                f"the weight of {name} must be at most {before[name]}, got {list(shape)}"
            )
    for name, shape in shapes.items():
        module = modules[name]
        _replace_(module, module.weight.new_empty(*shape), _resized_bias(module, shape[0]))
    return before


@torch.no_grad()
def widen_(model: nn.Module, shapes: ShapeTable) -> None:
    """Give linear layers larger weights, padded with zeros.

    The model still computes the same: the output of a padded channel is multiplied by zero weights
    of the next layer, whatever the activation in between.
    """
    for name, shape in shapes.items():
        linear = _resizable(model, name)
        d_out, d_in = linear.weight.shape
        weight = linear.weight.new_zeros(*shape)
        weight[:d_out, :d_in] = linear.weight
        bias = _resized_bias(linear, shape[0])
        if bias is not None:
            bias.zero_()[:d_out] = linear.bias
        _replace_(linear, weight, bias)


def _resizable(model: nn.Module, name: str) -> Any:
    module = find_module(model, name)
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise ValueError(f"{name} is not a linear layer or embedding of {type(model).__name__}")
    return module


def _resized_bias(module: Any, d_out: int) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.new_empty(d_out)


def _replace_(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    trained = module.weight.requires_grad
    module.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=trained)
    if isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    else:
        module.out_features, module.in_features = weight.shape
