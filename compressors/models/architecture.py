"""The structure of a model, found from its module tree, not from its name.

The skeleton is the real model class with every parameter on the meta device: shapes, names and
buffers, but no weights. Decoder layers are the `ModuleList` that holds most of the parameters;
every `nn.Linear` inside can be compressed. Fused experts are split into linear layers. The layers
of an encoder-decoder model are those of the encoder, followed by those of the decoder.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lrc.compressors.layers.experts import Expert, FusedTensor, split_experts_, split_modules
from lrc.compressors.layers.model_shapes import rebuild_
from lrc.compressors.models.auto_class import auto_class
from lrc.compressors.models.configuration import SUPPORTED, first_line
from lrc.compressors.models.model_kinds import ModelKind, kind_of
from lrc.compressors.models.source import Source
from lrc.configs.errors import ModelError

MAX_BUFFER = 2**28  # values of the largest table that is computed in memory
RANDOM = {
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
    *(torch.Tensor.normal_, torch.Tensor.uniform_),
}
"""Functions that draw the values of parameters."""


@dataclass(frozen=True)
class Linear:
    """A linear layer inside a decoder layer; its weight is [d_out, d_in]."""

    name: str
    layer: int
    d_out: int
    d_in: int
    bias: bool
    expert: int | None = None
    """Number of the expert that it belongs to, which receives only some of the tokens."""


@dataclass(frozen=True)
class Architecture:
    """A skeleton, its decoder layers and their linears.

    `tied` maps a parameter's name to the name of the one with which it shares its tensor.
    """

    model: Any
    layer_names: list[str]
    linears: list[Linear]
    tied: dict[str, str]
    unused: dict[str, str] = field(default_factory=dict)
    """Linears of decoder layers that no stage may replace, and why; see `layer_check`."""
    experts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name of a module of experts -> their number, and how many of them a token selects; found by
    `layer_check`."""
    groups: list[list[list[str]]] = field(default_factory=list)
    """By layer, the linears of each distinct input, in order of use; found by `layer_check`."""
    plain_layers: bool = False
    """Whether `groups` and the arguments of the layers are all there is to know about their calls:
    layers return hidden states only, and have no experts; found by `layer_check`."""
    n_encoder: int = 0
    """How many of the layers, from the first, are those of the encoder of an encoder-decoder
    model."""

    @property
    def kind(self) -> ModelKind:
        """What the model computes."""
        return kind_of(self.model.config)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return [self.model.get_submodule(name) for name in self.layer_names]

    def other_parts(self) -> dict[str, nn.Module]:
        """Return the modules next to the text decoder, such as a vision tower, by name.

        Embeddings and output heads of the text are not among them. Encoders and encoder-decoder
        models have none.
        """
        if self.kind.padded:
            return {}
        decoder = self.model.get_decoder()
        path = next((name for name, each in self.model.named_modules() if each is decoder), "")
        if not self.layer_names[0].startswith(f"{path}.") or not path:
            return {}
        ends = (decoder, self.model.get_input_embeddings(), self.model.get_output_embeddings())
        found, parts = {}, path.split(".")
        for depth in range(len(parts)):
            owner = ".".join(parts[:depth])
            for leaf, module in self.model.get_submodule(owner).named_children():
                known = leaf == parts[depth] or any(module is end for end in ends)
                if not known and any(True for _ in module.parameters()):
                    found[f"{owner}.{leaf}" if owner else leaf] = module
        return found

    def stored_parameters(self) -> dict[str, torch.Tensor]:
        """Return name -> meta tensor of everything in a checkpoint: tied parameters once."""
        state: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name not in self.tied}

    def fused_tensors(self) -> dict[str, tuple[FusedTensor, list[str]]]:
        """Return the parameters that the model class has for all experts of a layer at once.

        By full name, with the names of the tensors of the skeleton that hold one expert each.
        """
        return {
            f"{name}.{tensor.leaf}": (
                tensor,
                [f"{name}.{tensor.name_of(expert)}" for expert in range(module.n_experts)],
            )
            for name, module in split_modules(self.model)
            for tensor in module.tensors
        }


def build(source: Source) -> Architecture:
    """Build the skeleton of a model and find its decoder layers and linears.

    Raises
    ------
    ModelError
        If the architecture is unknown, or its weights have an unsupported form.
    """
    config, kind = source.config, kind_of(source.config)
    if getattr(config, "is_encoder_decoder", False) and not kind.translates:
        raise unsupported(
            config, "it is an encoder-decoder model that AutoModelForSeq2SeqLM does not load"
        )
    if any(name.endswith("ForMaskedLM") for name in config.architectures or []):
        raise unsupported(config, "it predicts masked tokens, not the next one")
    if not kind.padded and auto_class(config) is None:
        raise unsupported(config, "transformers has no causal language model of this type")
    try:
        with init_empty_weights(include_buffers=False), _NoLargeTensors():
            model = kind.auto_class.from_config(
                config, dtype=torch.float32, trust_remote_code=source.spec.trust_remote_code
            )
    except Exception as error:  # modeling code may raise anything for the values of a config
        raise unsupported(config, first_line(error)) from error
    split_experts_(model)
    if kind.padded and any(split_modules(model)):
        raise unsupported(config, "its encoder has experts")
    rebuild_(model)
    _compute_unsaved_(model)
    for parameter in model.parameters():  # not the buffers: computed tables and scales stay exact
        parameter.data = parameter.data.to(source.dtype)
    return describe(model)


def _compute_unsaved_(model: Any) -> None:
    """Give values to parameters that the class computes instead of saving them.

    They become buffers without a place in files, such as the positions of Marian.
    """
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        parameter = owner._parameters.pop(leaf, None)
        if parameter is not None:
            value = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
            owner.register_parameter(leaf, value)
            model._init_weights(owner)
            del owner._parameters[leaf]
            owner.register_buffer(leaf, value.detach(), persistent=False)


def describe(model: Any) -> Architecture:
    """Find the decoder layers and linears of a skeleton; raises as `build`."""
    config = model.config
    lists = _layer_lists(model, config)
    names = [f"{name}.{index}" for name, layers in lists for index in range(len(layers))]
    layers = [layer for _, each in lists for layer in each]
    linears = []
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        _refuse_unsupported_weights(name, layer, config)
        experts = {
            n: int(n.rpartition(".")[2]) for n, m in layer.named_modules() if type(m) is Expert
        }
        linears += [
            Linear(
                f"{name}.{n}",
                index,
                m.out_features,
                m.in_features,
                m.bias is not None,
                experts.get(n.rpartition(".")[0]),
            )
            for n, m in layer.named_modules()
            if isinstance(m, nn.Linear)
        ]
    if not linears:
        raise unsupported(config, f"its layers ({type(layers[0]).__name__}) hold no nn.Linear")
    n_encoder = len(lists[0][1]) if kind_of(config).translates else 0
    tied = dict(model.all_tied_weights_keys)
    return Architecture(model.eval(), names, linears, tied, n_encoder=n_encoder)


class _NoLargeTensors(TorchFunctionMode):
    """Create what would not fit into memory, such as the experts of a layer, without values.

    Tensors without values are not initialized, which takes PyTorch a millisecond each.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM:
            tensor: torch.Tensor = kwargs.get("tensor", args[0] if args else None)
            if tensor.is_meta:
                return tensor
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand):
            sizes = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if prod(sizes) > MAX_BUFFER and kwargs.get("device") is None:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _layer_lists(model: Any, config: Any) -> list[tuple[str, nn.ModuleList]]:
    """Find the list of repeated layers, or those of encoder and decoder, by name."""
    kind = kind_of(config)
    if kind.translates:
        both = model.get_encoder(), model.get_decoder()
        return [_repeated_layers(model, part, None, config) for part in both]
    decoder = model.base_model if kind.encoder else model.get_decoder()
    n_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    return [_repeated_layers(model, decoder, n_layers, config)]


def _repeated_layers(
    model: Any, decoder: Any, n_layers: int | None, config: Any
) -> tuple[str, nn.ModuleList]:
    """Find the list of repeated layers in a part of a model, such as its text decoder.

    Of the lists with the length that the config states (or else of all) it is the outermost one:
    the towers of other modalities are deeper. Of several, it has the most parameters.
    """
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model  # ModernBERT's `decoder` is its head
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")

    def rank(name: str, layers: nn.ModuleList) -> tuple[bool, int, int]:
        size = sum(parameter.numel() for parameter in layers.parameters())
        return len(layers) == n_layers, -name.count("."), size

    candidates = [
        (name, module)
        for name, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not candidates:
        raise unsupported(config, "it has no list of repeated layers")
    return max(candidates, key=lambda candidate: rank(*candidate))


def _refuse_unsupported_weights(name: str, layer: nn.Module, config: Any) -> None:
    for child_name, child in layer.named_modules():
        if isinstance(child, Conv1D):
            raise unsupported(config, f"{name}.{child_name} is a Conv1D, not an nn.Linear")
        for parameter_name, parameter in child.named_parameters(recurse=False):
            full_name = f"{name}.{child_name}.{parameter_name}"
            owner = f"{child_name}.{parameter_name} {type(child).__name__}".lower()
            if parameter.ndim >= 3 and "expert" in owner:
                shape = list(parameter.shape)
                raise unsupported(config, f"{full_name} holds fused experts {shape}")


def unsupported(config: Any, reason: str) -> ModelError:
    """Return the error for a model whose architecture cannot be compressed."""
    architectures = getattr(config, "architectures", None) or [type(config).__name__]
    return ModelError(
        f"model: {architectures[0]} (model_type {config.model_type!r}) is not supported yet: "
        f"{reason}; supported are {SUPPORTED}"
    )
