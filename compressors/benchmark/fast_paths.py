"""The compressed weights of a model for which the device has no fast path."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from lrc.compressors.checkpoint.format import expected_tensors
from lrc.compressors.checkpoint.reader import Contents
from lrc.compressors.io.freed_memory import trim
from lrc.compressors.io.natural_order import natural
from lrc.compressors.kernels import FastPath, optimize, slow_layers
from lrc.compressors.kernels.failures import described
from lrc.compressors.layers import ComponentConfig, CompressedLinear, WeightConfig
from lrc.compressors.layers.component import Component
from lrc.compressors.models.model_kinds import kind_of

REBUILT = "the matrix is rebuilt for every call"
Reasons = dict[str, str]
"""Form of a component -> why no fast path serves it."""


@dataclass(frozen=True)
class SlowForm:
    """Weights that are stored in the same way, and are multiplied by plain PyTorch."""

    form: str
    """Type of the component, its pattern and quantization, such as ``dense int4-g64``."""
    reason: str
    """Why no fast path serves it."""
    weights: tuple[str, ...]
    """Names of the layers."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        example = self.weights[0]
        return {
            "form": self.form,
            "layers": len(self.weights),
            "example": example,
            "reason": self.reason,
        }


def slow_forms(model: nn.Module) -> list[SlowForm]:
    """Return what has no fast path in a loaded model, by form and reason."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, CompressedLinear)]
    return _grouped((name, slow_components(layer)) for name, layer in layers)


def slow_components(layer: CompressedLinear) -> Reasons:
    """Return why components of a layer have no fast path, after `optimize`, by their forms."""
    found: Reasons = {}
    for component in layer.components:
        # The component itself, or its factors, each of which is one product.
        reasons = [*dict.fromkeys(slow_layers(component).values())]
        rebuilt = type(component).forward is Component.forward
        if rebuilt and not isinstance(component, FastPath):
            reasons.append(REBUILT)
        if reasons:
            found[_form(component.config)] = "; ".join(reasons)
    return found


def stored_slow_forms(
    folder: Path, contents: Contents, device: str, dtype: torch.dtype
) -> list[SlowForm]:
    """Return what would have no fast path if a checkpoint were loaded on a device.

    One layer of each configuration is loaded, one after the other. Checkpoints in other formats
    have none: lrc does not multiply by their weights.

    Parameters
    ----------
    folder : Path
        Of the checkpoint, in which tensors match the config.
    contents : Contents
    device : str
    dtype : torch.dtype
        To run in.
    """
    if not contents.needs_lrc:
        return []
    looked_up, known = _looked_up(folder, contents), dict[str, Reasons]()
    layers: list[tuple[str, Reasons]] = []
    for name, config in contents.modules.items():
        if name in looked_up:
            continue
        key = _key(config)
        if key not in known:
            known[key] = _stored_slow_components(name, config, contents, device, dtype)
            trim()
        layers.append((name, known[key]))
    return _grouped(layers)


def _grouped(layers: Iterable[tuple[str, Reasons]]) -> list[SlowForm]:
    """Return forms and their layers in an order that does not depend on that of the layers."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, reasons in layers:
        for each in reasons.items():
            found.setdefault(each, []).append(name)
    return [SlowForm(*each, tuple(sorted(found[each], key=natural))) for each in sorted(found)]


def _stored_slow_components(
    name: str, config: WeightConfig, contents: Contents, device: str, dtype: torch.dtype
) -> Reasons:
    try:
        return slow_components(_load_layer(name, config, contents, device, dtype))
    except (RuntimeError, ValueError, IndexError, SafetensorError) as error:  # damaged tensors
        reason = f"the layer cannot be loaded ({described(error)})"
        return {_form(component): reason for component in config.components}


def _form(config: ComponentConfig) -> str:
    args = None if config.quantization is None else str(config.quantization)
    return " ".join(filter(None, (config.type, config.pattern, args)))


def _key(config: WeightConfig) -> str:
    """Return what determines which fast paths serve a layer."""
    record = config.to_json()
    for component in record["components"]:
        component["shares"] = "shares" in component
    return json.dumps(record)


def _load_layer(
    name: str, config: WeightConfig, contents: Contents, device: str, dtype: torch.dtype
) -> CompressedLinear:
    bias = f"{name}.bias" in contents.headers
    layer = CompressedLinear(config, bias=bias, device=device, dtype=dtype).requires_grad_(False)
    tensors = {}
    for tensor in expected_tensors(name, config, bias=bias):
        header = contents.headers[tensor]
        with safe_open(header.file, framework="pt") as file:
            tensors[tensor.removeprefix(f"{name}.")] = file.get_tensor(header.name)
    layer.load_state_dict(tensors)
    optimize(layer)
    return layer


def _looked_up(folder: Path, contents: Contents) -> set[str]:
    """Return the embeddings that no output head is tied to: nothing is multiplied by them."""
    config = contents.config
    sizes = {c.shape[0] for c in contents.modules.values() if c.types == "dense"}
    vocabulary = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if config.get("tie_word_embeddings", True) or vocabulary not in sizes:
        return set()
    with suppress(Exception), torch.device("meta"):  # a class that needs its own code, say
        # Explicitly untrusted: transformers would ask on the terminal.
        found: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: Any = kind_of(found).auto_class.from_config(found, trust_remote_code=False)
        return {name for name, each in model.named_modules() if isinstance(each, nn.Embedding)}
    return set()
