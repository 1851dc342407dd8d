"""Compare a GGUF file with the model that transformers makes of it.

transformers reads the metadata keys in a table of each architecture and ignores the rest, which
llama.cpp may use in its computation.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.utils import (
    get_gguf_conversion_mapping,
    is_gguf_arch_supported,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map as map_names

from lrc.compressors.io.gguf_file import read_gguf
from lrc.compressors.io.shards import Header
from lrc.compressors.io.shortened import shortened
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.configuration import first_line, refuse_part
from lrc.compressors.models.contents import Contents, match, renamed
from lrc.configs.errors import ModelError

# Keys that change the computation, with the value that means the same as no key, if there is one.
NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.key_length": None,
    "attention.layer_norm_epsilon": None,
    "attention.layer_norm_rms_epsilon": None,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attention.value_length": None,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.dimension_count": None,
    "rope.freq_base": None,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.factor": 1,
    "rope.scaling.type": "none",
}
# Keys that describe, that sizes of tensors show, or that act only together with one of those above.
INERT = re.compile(
    r"(.*context_length|vocab_size|block_count|feed_forward_length|embedding_length"
    r"|tensor_data_layout|rope\.scaling\.(finetuned|yarn_.*))"
)
# Tensors that scale the rotary frequencies.
ROPE = re.compile(r"(^|\.)rope_(freqs|factors_\w+)\.weight$")


def check_gguf(path: Path, architecture: Architecture) -> tuple[Contents, list[str]]:
    """Compare the tensors and the metadata of a GGUF file with a model; return warnings too.

    Raises
    ------
    ModelError
        A mixture of experts, a part of a model, missing tensors, or metadata that changes the
        computation and that transformers does not read.
    """
    metadata, headers = read_gguf(path)
    if architecture.fused_tensors():
        raise ModelError(
            f"model.path: {path} holds a mixture of experts, which lrc reads from safetensors "
            "only; give the original model"
        )
    refuse_part(path, metadata, len(headers), len(architecture.stored_parameters()))
    contents = match(headers, _names(path, metadata, headers, architecture), architecture)
    for name, parameter in architecture.stored_parameters().items():
        header = contents.header_of(name)
        # Vectors and kernels may lack a dimension of size 1.
        if header is not None and math.prod(header.shape) != parameter.numel():
            contents.problems.append(f"{name} is {header.shape}, not {list(parameter.shape)}")
    contents.refuse_problems(
        f"{path} do not fit its metadata",
        "it may be one part of a split model (merge the parts first), or incomplete: copy or "
        "download it again, or give the original model",
    )
    changing, other = ignored_metadata(metadata, architecture.model.config)
    changing += [header.name for header in contents.unused if ROPE.search(header.name)]
    if changing:
        raise ModelError(
            f"model.path: transformers does not read {shortened(changing, ', ')} of {path}, and "
            "would make another model of it; give the original model (a folder of safetensors)"
        )
    if not other:
        return contents, []
    return contents, [
        "model.path: metadata of the source that transformers does not read is left out "
        f"({len(other)}): {shortened(other, ', ')}"
    ]


def ignored_metadata(metadata: dict[str, Any], config: Any) -> tuple[list[str], list[str]]:
    """Return the keys of the architecture that transformers does not read, with their values.

    First those that change the computation, then others. Keys with the value that the config has
    without them are left out.
    """
    architecture = metadata["general.architecture"]
    table: Any = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    changing, other = [], []
    for key, value in metadata.items():
        prefix, _, suffix = key.partition(".")
        if prefix != architecture or table.get(suffix) is not None or INERT.fullmatch(suffix):
            continue
        expected = NEUTRAL.get(suffix), _of(config, suffix, value)
        if any(_equal(value, each) for each in expected):
            continue
        if suffix in NEUTRAL:
            changing.append(f"{key} = {value!r:.60}")
        elif table and suffix not in table:
            other.append(f"{key} = {value!r:.60}")
    return changing, other


def _of(config: Any, suffix: str, value: Any) -> Any:
    """Return the value that a config has for a key of GGUF; None if it has none."""

    def one_of(*names: str, default: Any = None) -> Any:
        return next((found for n in names if (found := getattr(config, n, None))), default)

    if suffix == "attention.sliding_window" and not isinstance(value, list):
        no_limit = value >= one_of("max_position_embeddings", default=math.inf)
        return value if no_limit else one_of("sliding_window")
    head_dim = one_of("hidden_size", default=1) // one_of("num_attention_heads", default=1)
    head_dim = one_of("head_dim", default=head_dim)
    rope = one_of("rope_parameters", default={})
    rope = rope.get("full_attention", rope)
    partial = rope.get("partial_rotary_factor", one_of("partial_rotary_factor", default=1.0))
    epsilon = one_of(
        "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps", "rms_norm_eps"
    )
    return {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_epsilon": epsilon,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.scale": one_of("query_pre_attn_scalar", default=head_dim) ** -0.5,
        "rope.dimension_count": int(head_dim * partial),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.type": rope.get("rope_type"),
        "rope.scaling.factor": rope.get("factor"),
    }.get(suffix, getattr(config, suffix, None))


def _equal(a: Any, b: Any) -> bool:
    """Compare values of metadata; an array is compared number by number."""
    if isinstance(a, list):
        return all(_equal(each, b) for each in a)
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _names(
    path: Path, metadata: dict[str, Any], headers: dict[str, Header], architecture: Architecture
) -> dict[str, str | None]:
    """Return name in the file -> name in the module tree, as transformers maps them; else ""."""
    kind, model = metadata["general.architecture"], architecture.model
    if is_gguf_arch_supported(kind):
        found = renamed(headers, get_gguf_conversion_mapping(kind, model.config), model)
        return {key: name for key, (name, _) in found.items()}

    def shallow(module: Any, *children: tuple[str, Any]) -> Any:
        """Stand in for a module: transformers would make the table for each of its submodules."""
        return SimpleNamespace(
            config=model.config, state_dict=module.state_dict, named_children=lambda: children
        )

    processor: Any = TENSOR_PROCESSORS.get(kind, TensorProcessor)
    # Some models were converted without the prefix of the causal model.
    base = (model.base_model_prefix, shallow(model.base_model))
    try:
        names = map_names(shallow(model, base), processor(model.config.to_dict()))
    except NotImplementedError as error:  # of an architecture that the package gguf lacks
        raise ModelError(
            f"model.path: {path}: {first_line(error)}; give the original model"
        ) from error
    return {name: names.get(name, "") for name in headers}
