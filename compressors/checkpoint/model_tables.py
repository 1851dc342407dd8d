"""Tables of a config in terms of a model: its names when it is loaded, its contents when saved."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lrc.compressors.layers import CompressedLinear, WeightConfig
from lrc.compressors.layers.experts import fused_modules
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.compressors.layers.residual_basis import BIASES, NORMS, find_module

MODULES = "modules"


def fit_names(tables: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return the tables with the names that the class of `model` uses.

    Other classes than the compressed one hold the same decoder, with or without the prefix of its
    name, and may lack the head: entries of the head are then left out. Names that do not belong to
    the model at all are kept, for an error later.

    Parameters
    ----------
    tables : mapping
        Modules, shapes, biases and norms of a ``quantization_config``.
    model : PreTrainedModel
        Without weights, before any layer has been replaced.
    """
    names = [name for table in tables.values() for name in table]
    found = {name: _find(name, model) for name in names}
    roots = {name.partition(".")[0] for name in names if found[name] is not None}
    renamed: dict[str, str | None] = {}
    for name, local in found.items():
        root, dot, _ = name.partition(".")
        head = not dot or (roots and root not in roots)
        if type(model).__name__ in (model.config.architectures or []) or not head:
            local = local or name
        renamed[name] = local
    return {key: _rename(table, renamed) for key, table in tables.items()}


def has_experts(names: Iterable[str], model: Any) -> bool:
    """Return whether some of the names are those of layers of fused experts, before they are split.

    As for `fit_names`, either side may lack the prefix of the decoder.
    """
    prefix = f"{model.base_model_prefix}."
    experts = tuple(f"{name.removeprefix(prefix)}." for name in fused_modules(model))
    return any(name.removeprefix(prefix).startswith(experts) for name in names)


def head_shapes(model: Any, known: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of heads that read a residual stream narrower than the config says.

    These are heads of other classes than the compressed one, such as classifiers; the shapes of its
    own are `known`.
    """
    width = model.get_input_embeddings().weight.shape[1]
    decoder = set(model.base_model.modules())
    return {
        name: [module.out_features, width]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module not in decoder
        and name not in known
        and module.in_features == model.config.hidden_size
    }


def added_biases(model: nn.Module, modules: Mapping[str, WeightConfig]) -> list[str]:
    """Return the names of layers that have a bias only if they are compressed."""
    return [
        name
        for name, config in modules.items()
        if config.bias and getattr(find_module(model, name), "bias", None) is None
    ]


def current_tables(tables: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the tables that describe a model which has been changed since it was loaded."""
    modules = {
        name: module.config.to_json()
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    shapes = {name: _shape(find_module(model, name)) for name in tables.get(SHAPES, {})}
    return {
        MODULES: modules,
        SHAPES: {name: shape for name, shape in shapes.items() if shape is not None},
        BIASES: [name for name in tables.get(BIASES, []) if find_module(model, name) is not None],
        NORMS: {
            name: entry
            for name, entry in tables.get(NORMS, {}).items()
            if find_module(model, name) is not None
        },
    }


def _find(name: str, model: Any) -> str | None:
    """Return the name of a module in `model`, with or without the prefix of the decoder."""
    prefix = f"{model.base_model_prefix}."
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((each for each in candidates if find_module(model, each) is not None), None)


def _rename(value: Any, renamed: Mapping[str, str | None]) -> Any:
    """Replace names in keys and values of a table; leave out those without a new name."""
    if isinstance(value, Mapping):
        return {
            renamed.get(key, key): _rename(entry, renamed)
            for key, entry in value.items()
            if renamed.get(key, key) is not None
        }
    if isinstance(value, list | tuple):
        return [each for each in (_rename(entry, renamed) for entry in value) if each is not None]
    return renamed.get(value, value) if isinstance(value, str) else value


def _shape(module: Any) -> list[int] | None:
    if module is None:
        return None
    shape = module.config.shape if isinstance(module, CompressedLinear) else module.weight.shape
    return list(shape)
