"""The structure of a model, found from its module tree, not from its name.

The skeleton is the real model class with every parameter on the meta device: shapes, names and
buffers, but no weights. Decoder layers are the `ModuleList` that holds most of the parameters;
every `nn.Linear` inside can be compressed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lrc.compressors.layers.model_shapes import rebuild_
from lrc.compressors.models.configuration import SUPPORTED, first_line
from lrc.compressors.models.source import Source
from lrc.configs.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """A linear layer inside a decoder layer; its weight is [d_out, d_in]."""

    name: str
    layer: int
    d_out: int
    d_in: int
    bias: bool


@dataclass(frozen=True)
class Architecture:
    """A skeleton, its decoder layers and their linears.

    `tied` maps a parameter's name to the name of the one with which it shares its tensor.
    """

    model: Any
    layer_names: list[str]
    linears: list[Linear]
    tied: dict[str, str]

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return [self.model.get_submodule(name) for name in self.layer_names]

    def stored_parameters(self) -> dict[str, torch.Tensor]:
        """Return name -> meta tensor of everything in a checkpoint: tied parameters once."""
        state: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name not in self.tied}


def build(source: Source) -> Architecture:
    """Build the skeleton of a model and find its decoder layers and linears.

    Raises
    ------
    ModelError
        If the architecture is unknown, or its weights have an unsupported form.
    """
    config = source.config
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(config, "it is an encoder-decoder model")
    if any(name.endswith("ForMaskedLM") for name in config.architectures or []):
        raise _unsupported(config, "it predicts masked tokens, not the next one")
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=source.spec.trust_remote_code
            )
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise _unsupported(config, first_line(error)) from error
    rebuild_(model)
    for parameter in model.parameters():  # not the buffers: computed tables and scales stay exact
        parameter.data = parameter.data.to(source.dtype)
    list_name, layers = _decoder_layers(model, config)
    names = [f"{list_name}.{index}" for index in range(len(layers))]
    linears = []
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        _refuse_unsupported_weights(name, layer, config)
        linears += [
            Linear(f"{name}.{n}", index, m.out_features, m.in_features, m.bias is not None)
            for n, m in layer.named_modules()
            if isinstance(m, nn.Linear)
        ]
    if not linears:
        raise _unsupported(config, f"its layers ({type(layers[0]).__name__}) hold no nn.Linear")
    return Architecture(model.eval(), names, linears, dict(model.all_tied_weights_keys))


def _decoder_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """Find the repeated layers: of all module lists of one class, the one with most parameters."""
    candidates = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(child) for child in module}) == 1
    ]
    if not candidates:
        raise _unsupported(config, "it has no list of repeated layers")
    _, name, layers = max(candidates, key=lambda candidate: candidate[0])
    return name, layers


def _refuse_unsupported_weights(name: str, layer: nn.Module, config: Any) -> None:
    for child_name, child in layer.named_modules():
        if isinstance(child, Conv1D):
            raise _unsupported(config, f"{name}.{child_name} is a Conv1D, not an nn.Linear")
        for parameter_name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 3 and not isinstance(child, nn.Conv1d | nn.Conv2d):
                full_name = f"{name}.{child_name}.{parameter_name}"
                shape = list(parameter.shape)
                raise _unsupported(config, f"{full_name} holds fused experts {shape}")


def _unsupported(config: Any, reason: str) -> ModelError:
    architectures = getattr(config, "architectures", None) or [type(config).__name__]
    return ModelError(
        f"model: {architectures[0]} (model_type {config.model_type!r}) is not supported yet: "
        f"{reason}; supported are {SUPPORTED}"
    )
