"""A model that is other than its config says: linears of other shapes, and what goes with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.residual_basis import BIASES, NORMS, add_biases_, place_norms_

SHAPES = "shapes"
TABLES = (SHAPES, BIASES, NORMS)
"""Keys of a config's ``quantization_config`` under which it says how the model differs from it."""
ShapeTable = Mapping[str, Sequence[int]]
"""Full name of a linear or of an embedding -> shape of its weight."""


def tables_of(config: Any) -> dict[str, Any]:
    """Return the tables that a config carries, by their keys; most carry none."""
    block = getattr(config, "quantization_config", None) or {}
    found = block if isinstance(block, Mapping) else vars(block)
    return {key: found[key] for key in TABLES if found.get(key)}


def shapes_of(config: Any) -> dict[str, list[int]]:
    """Return the shapes that a config carries."""
    return dict(tables_of(config).get(SHAPES, {}))


def rebuild_(model: Any) -> None:
    """Make a model without weights what its config's tables say.

    Raises
    ------
    ValueError
        If they do not fit it.
    """
    tables = tables_of(model.config)
    resize_(model, tables.get(SHAPES, {}))
    add_biases_(model, tables.get(BIASES, []))
    place_norms_(model, tables.get(NORMS, {}))


@torch.no_grad()
def resize_(model: nn.Module, shapes: ShapeTable) -> dict[str, list[int]]:
    """Give linears and embeddings of a model without weights the shapes of a table.

    Parameters
    ----------
    model : nn.Module
        What is resized has uninitialised weights afterwards, on the device they were on.
    shapes : mapping

    Returns
    -------
    dict of str to list of int
        The shapes that those had.

    Raises
    ------
    ValueError
        If a name is that of none, or a shape is wider than it; nothing is changed then.
    """
    modules = {name: _resizable(model, name) for name in shapes}
    before = {name: list(module.weight.shape) for name, module in modules.items()}
    for name, shape in shapes.items():
        if any(new > old for new, old in zip(shape, before[name], strict=True)):
            raise ValueError(f"{name} is {before[name]} and cannot become {list(shape)}, wider")
    for name, shape in shapes.items():
        module = modules[name]
        _replace_(module, module.weight.new_empty(*shape), _resized_bias(module, shape[0]))
    return before


@torch.no_grad()
def widen_(model: nn.Module, shapes: ShapeTable) -> None:
    """Give linears the larger shapes of a table, with zeros where nothing was.

    Channels between linears that are made of zeros are multiplied with zeros: the model computes
    what it did, whatever activation lies between.
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
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise ValueError(
            f"{name} is no linear layer of {type(model).__name__}, and no embedding either"
        )
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
