"""Tiny random models of any language model of transformers, from its config class alone.

Config classes name the same thing in many ways (`hidden_size`, `d_model`, `n_embd`): `tiny_model`
sets every size by the words in its name, and tries a few such configs until the model can be built
and run. Nothing here is written for a particular family.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

VOCABULARY = 576  # the shared tokenizer has 512 tokens; the rest are markers of other modalities
LAYERS, HIDDEN, HEAD, WINDOW = 4, 64, 16, 16
MOST_PARAMETERS = 4_000_000

# Words of a name -> size; the first pattern that matches anywhere in the name decides. Only numbers
# above the size are reduced, except where the size is negative: its absolute value is always set.
SIZES: list[tuple[str, int]] = [
    (r"^vocab_size$", -VOCABULARY),
    (r"(shape|pronunciation|audio|per_layer|encoder|decoder)?_?vocab", VOCABULARY),
    (r"type_vocab|token_type", 2),
    (r"position|max_seq_len|seq_length|n_ctx|context_length|model_max_length", 256),
    (r"first_k_dense|num_dense_layers|layer_start_index|n_hash_layers", 1),
    (r"layer_period|layer_interval|layer_step|layer_group|every_n|window_pattern|sparse_step", 2),
    (r"layer_offset", 1),
    (r"max_window_layers|num_kv_shared_layers|num_global_layers", 2),
    (r"n_recurrent_layers", 2),
    (r"nextn|mtp|n_(in|out)put_layers|layers_per_\w*block|layer_index_start", 1),
    (r"layer_index_end|layer_end_index", 3),
    (
        r"^(n|num|encoder|decoder|num_encoder|num_decoder|num_hidden|conf_num_hidden)_?layers?$",
        -LAYERS,
    ),
    (r"layers$|^depth$|num_blocks", LAYERS),
    (r"per_tok|top_?k|moe_k$|^topk_group$|experts_per", 2),
    (r"shared_experts$", 1),
    (r"n_group$|expert_groups?$", 2),
    (r"(n|num)_(\w+_)?experts$|expert_num$", 4),
    (r"index_n_heads|kv_heads|key_value_heads|kv_n_heads|query_groups|num_key_heads", 2),
    (r"mamba_(n|num)_heads|mamba_heads", 8),
    (r"num_value_heads|linear_num_heads", 4),
    (r"(n|num)_\w*heads?$|n_heads?$|attention_heads$", -4),
    (r"rope_head_dim|rotary_dim|d_rel", 8),
    (r"^qk_head_dim", 24),
    (
        r"head_?(dim|size)$|dim_head|d_head|headdim|kv_channels|d_kv|query_pre_attn|state_size|d_state",
        HEAD,
    ),
    (r"rank|codebook|altup", 16),
    (r"window|chunk_size|chunk_length|^attention_chunk|block_size|local_attention", WINDOW),
    (
        r"shared_intermediate|intermediate|ffn|d_ff|^dff$|dim_ff|mlp_dim|n_inner|feed_forward|mlp$",
        96,
    ),
    (r"d_inner|d_ssm|lru_width", 2 * HIDDEN),
    (r"attention_hidden_size", -2 * HIDDEN),
    (
        r"hidden_size|hidden_dim|d_model|n_embd|emb\w*_dim|emb\w*_size|proj_dim|^dim$|d_embed|width",
        -HIDDEN,
    ),
    (r"groups|compress_ratio", 2),
    (r"budget", WINDOW),
    (r"image_size|crop_size", 32),
    (r"channels|features|_dim$|_size$", HIDDEN),
]
# A second choice, where heads must be as many as key and value heads, or a number is special.
CHANGES: list[dict[str, int]] = [
    {},
    {"fill": 1},
    {"kv": 4},
    {"fill": 1, "kv": 4},
    {"fill": 1, "kv": 1},
    {"kinds": 1},
    {"rope": 16},
    {"rope": 16, "kv": 4},
    {"head_dim": 32},
    {"layers": 8},
    {"layers": 12, "periods": 1},
    {"layers": 12, "periods": 1, "head_dim": 32},
    {"off": 1},
    {"sections": 1},
]


class NotBuilt(Exception):
    """No tiny model of a family could be built; the message is the last reason."""


def causal_families() -> dict[str, type[PreTrainedConfig]]:
    """Return model_type -> config class of every language model that transformers knows.

    Those that read images too are among them, unless they have another class for text alone.
    """
    known = (*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, *MODEL_FOR_CAUSAL_LM_MAPPING)
    return {config.model_type: config for config in known}


def auto_class_of(config_class: type[PreTrainedConfig]) -> Any:
    """Return the Auto class of a family, the one for text alone if there are two."""
    text = config_class in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def tiny_model(config_class: type[PreTrainedConfig], tokens: torch.Tensor) -> nn.Module:
    """Build a random model of a family that runs on tokens [n, length] on a CPU.

    Raises
    ------
    NotBuilt
    """
    reasons = []
    for config in _candidates(config_class, reasons):
        try:
            model = _built(config)
            with torch.no_grad():
                logits = model(input_ids=tokens, use_cache=False).logits
            if logits.shape[:2] != tokens.shape or not bool(torch.isfinite(logits).all()):
                raise ValueError(f"logits {list(logits.shape)} do not fit or are not finite")
            return model
        except Exception as error:  # whatever a model that was made for other sizes raises
            reasons.append(_line(error))
    raise NotBuilt(reasons[0] if reasons else "no candidate")


def _candidates(
    config_class: type[PreTrainedConfig], reasons: list[str]
) -> Iterator[PreTrainedConfig]:
    for changes in CHANGES:
        try:
            yield shrunk_config(config_class, **changes)
        except Exception as error:  # validators of configs raise nearly anything
            reasons.append(_line(error))


def _built(config: PreTrainedConfig) -> Any:
    """Build a model with random weights of a scale at which predictions differ from uniform."""
    with init_empty_weights():
        empty = auto_class_of(type(config)).from_config(config, dtype=torch.float32)
    count = sum(p.numel() for p in empty.parameters())
    if count > MOST_PARAMETERS:
        name, largest = max(empty.named_parameters(), key=lambda item: item[1].numel())
        raise ValueError(f"{count:,} parameters; {name} is {list(largest.shape)}")
    torch.manual_seed(0)
    model: Any = auto_class_of(type(config)).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.normal_(std=0.1)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=1.0)
    return model.eval()


def shrunk_config(config_class: type[PreTrainedConfig], **changes: int) -> PreTrainedConfig:
    """Return a config of a family with every size reduced by the words in its name."""
    return config_class(**_shrunk(config_class, _default(config_class), changes))


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    return config_class()


def _shrunk(
    config_class: type[PreTrainedConfig], default: PreTrainedConfig, changes: dict[str, int]
) -> dict[str, Any]:
    """Return the arguments of a config class that make it small."""
    fields = [field for field in dataclasses.fields(config_class) if field.init]
    if "periods" in changes:  # lists that follow from them are left to the class
        fields = [f for f in fields if f.default is not None or "layer" not in f.name]
    names = {field.name for field in fields}
    values = {name: vars(default).get(name) for name in names}
    reduced: dict[str, Any] = {}
    picked = _picked_layers(values, default, changes)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            reduced[name] = {"model_type": value.model_type, **_shrunk(type(value), value, changes)}
        elif name.endswith(("token_id", "token_index", "token_ids")):
            reduced[name] = _token(name, value)
        elif name == "is_decoder":
            reduced[name] = True
        elif value is None or (name == "rope_parameters" and "kinds" in changes):
            if "fill" in changes or name == "rope_parameters":
                reduced[name] = _filled(name, config_class, values, changes)
        elif isinstance(value, bool):
            reduced[name] = value and not ("off" in changes and name != "tie_word_embeddings")
        elif isinstance(value, int):
            reduced[name] = _size(name, value, changes)
        elif isinstance(value, list | tuple) and len(value) == picked.length:
            reduced[name] = type(value)(
                _size(name, v, changes) if type(v) is int and "types" not in name else v
                for v in picked.of(list(value))
            )
        elif isinstance(value, list) and value and isinstance(value[-1], list):
            reduced[name] = [_repeated(entry) for entry in value]  # [[kinds, times], ...]
        elif name == "rope_parameters" and isinstance(value, dict):
            sections = {"mrope_section": [4, 2, 2]} if "sections" in changes else {}
            reduced[name] = _rope(value | sections)
    return {name: value for name, value in reduced.items() if value != values[name]}


@dataclasses.dataclass(frozen=True)
class _Picked:
    """Layers of the default config that the small one has, one of every kind first."""

    length: int
    indices: list[int]

    def of(self, values: list[Any]) -> list[Any]:
        return [values[index] for index in self.indices]


def _picked_layers(
    values: dict[str, Any], default: PreTrainedConfig, changes: dict[str, int]
) -> _Picked:
    n_layers = getattr(default, "num_hidden_layers", None)
    wanted = changes.get("layers", LAYERS)
    lists = [v for v in values.values() if isinstance(v, list | tuple) and len(v) == n_layers]
    if not lists or not n_layers:
        return _Picked(n_layers or -1, list(range(min(wanted, n_layers or wanted))))
    kinds = [str(kind) for kind in zip(*lists, strict=True)]
    first = sorted({kinds.index(kind) for kind in kinds}, key=int)[:wanted]
    rest = [index for index in range(n_layers) if index not in first]
    return _Picked(n_layers, sorted((first + rest)[:wanted]))


def _size(name: str, value: int, changes: dict[str, int]) -> int:
    if "periods" in changes and re.search("period|offset|interval", name):
        return value
    for pattern, size in SIZES:
        if re.search(pattern, name):
            if abs(size) == LAYERS and "layer" in pattern and size < 0:
                return changes.get("layers", LAYERS)
            if size == HEAD and "head" in pattern:
                size = changes.get("head_dim", HEAD)
            if "rope" in changes and name in ("qk_rope_head_dim", "qk_head_dim"):
                size = changes["rope"] if "rope" in name else changes["rope"] + HEAD
            if size == 2 and "kv_heads" in pattern:
                size = changes.get("kv", 2)
            return -size if size < 0 and value > 0 else min(value, abs(size))
    return value


def _filled(
    name: str, config_class: type[PreTrainedConfig], values: dict[str, Any], changes: dict[str, int]
) -> Any:
    """Return a value for an optional argument that some configs cannot be without."""
    annotation = str(next(f.type for f in dataclasses.fields(config_class) if f.name == name))
    if (
        "int" in annotation
        and not re.search("list|dict", annotation + name)
        and "token" not in name
    ):
        size = _size(name, 10**9, changes)
        return None if size == 10**9 else size
    if name == "layer_types":
        kinds = _layer_types(config_class)
        return (kinds * LAYERS)[: changes.get("layers", LAYERS)] or None
    if name == "rope_parameters":
        plain = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        kinds = values.get("layer_types") or _layer_types(config_class)
        return dict.fromkeys(kinds, plain) if "kinds" in changes else plain
    options = values.get(f"{name.removeprefix('default_')}s")
    return options[0] if name.startswith("default_") and options else None


def _layer_types(config_class: type[PreTrainedConfig]) -> list[str]:
    """Return the kinds of layers that the code of a family names."""
    module = config_class.__module__.replace(".configuration_", ".modeling_")
    code = inspect.getsource(importlib.import_module(module))
    return [kind for kind in ALLOWED_LAYER_TYPES if f'"{kind}"' in code]


def _repeated(entry: list[Any]) -> list[Any]:
    if len(entry) == 2 and isinstance(entry[0], list) and isinstance(entry[1], int):
        return [entry[0], LAYERS // len(entry[0])]
    return entry


def _token(name: str, value: Any) -> Any:
    order = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 0}
    if isinstance(value, int):
        return order.get(name, 512 + sum(name.encode()) % 64) if value >= 0 else value
    if isinstance(value, list):
        return [1] * min(1, len(value))
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Shorten tables of rotary frequencies to the number of pairs in a head."""
    result = {}
    for key, entry in value.items():
        if isinstance(entry, dict):
            entry = _rope(entry)
        elif key == "mrope_section":
            entry = [4, 2, 2][: len(entry)]
        elif isinstance(entry, list) and len(entry) > HEAD // 2:
            entry = entry[: HEAD // 2]
        elif key == "original_max_position_embeddings":
            entry = min(entry, 128)
        result[key] = entry
    return result


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
