"""Linears of other shapes than a model's config says: narrower, each by a table of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TABLE = "shapes"
"""Key of the table in a config's ``quantization_config``."""
ShapeTable = Mapping[str, Sequence[int]]
"""Full name of a linear -> ``[d_out, d_in]`` of its weight."""


def shapes_of(config: Any) -> dict[str, list[int]]:
    """Return the table that a config carries; most carry none."""
    block = getattr(config, "quantization_config", None)
    if block is None:
        return {}
    found = block.get(TABLE) if isinstance(block, Mapping) else getattr(block, TABLE, None)
    return dict(found or {})


@torch.no_grad()
def resize_(model: nn.Module, shapes: ShapeTable) -> dict[str, list[int]]:
    """Give linears of a model without weights the shapes of a table.

    Parameters
    ----------
    model : nn.Module
        Linears that are resized have uninitialised weights afterwards, on the device they were on.
    shapes : mapping

    Returns
    -------
    dict of str to list of int
        The shapes that those linears had.

    Raises
    ------
    ValueError
        If a name is that of no linear, or a shape is wider than it; nothing is changed then.
    """
    linears = {name: _linear(model, name) for name in shapes}
    before = {name: list(linear.weight.shape) for name, linear in linears.items()}
    for name, shape in shapes.items():
        if any(new > old for new, old in zip(shape, before[name], strict=True)):
            raise ValueError(f"{name} is {before[name]} and cannot become {list(shape)}, wider")
    for name, shape in shapes.items():
        linear = linears[name]
        _replace_(linear, linear.weight.new_empty(*shape), _resized_bias(linear, shape[0]))
    return before


@torch.no_grad()
def widen_(model: nn.Module, shapes: ShapeTable) -> None:
    """Give linears the larger shapes of a table, with zeros where nothing was.

    Channels between linears that are made of zeros are multiplied with zeros: the model computes
    what it did, whatever activation lies between.
    """
    for name, shape in shapes.items():
        linear = _linear(model, name)
        d_out, d_in = linear.weight.shape
        weight = linear.weight.new_zeros(*shape)
        weight[:d_out, :d_in] = linear.weight
        bias = _resized_bias(linear, shape[0])
        if bias is not None:
            bias.zero_()[:d_out] = linear.bias
        _replace_(linear, weight, bias)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is no linear layer of {type(model).__name__}")
    return module


def _resized_bias(linear: nn.Linear, d_out: int) -> Tensor | None:
    return None if linear.bias is None else linear.bias.new_empty(d_out)


def _replace_(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    trained = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trained)
    linear.out_features, linear.in_features = weight.shape
