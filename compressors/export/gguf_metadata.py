"""The metadata of a GGUF file that describes the computation of a model."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from gguf import GGMLQuantizationType, LlamaFileType

from lrc.compressors.export.gguf_families import Family, sliding_period

QUANTIZATION_VERSION = 2
"""Version of the block types in files of GGUF version 3."""
FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


def model_metadata(
    config: Any, family: Family, widths: list[int], vocabulary: int
) -> dict[str, Any]:
    """Return the keys of the architecture, without its prefix, except for rotary ones.

    Parameters
    ----------
    config : PreTrainedConfig
    family : Family
    widths : list of int
        Of the MLPs, one per layer.
    vocabulary : int
        Rows of the embedding.
    """
    heads, n_layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    # llama.cpp attends to all tokens where a family has no windows: the same up to this length.
    limits = [config.max_position_embeddings] + [window] * bool(window and not family.window)
    uneven = len({*widths}) > 1
    keys = {
        "vocab_size": vocabulary,
        "context_length": min(limits),
        "embedding_length": config.hidden_size,
        "block_count": n_layers,
        "feed_forward_length": widths if uneven else widths[0],
        "attention.head_count": [heads] * n_layers if uneven else heads,
        "attention.head_count_kv": [kv_heads] * n_layers if uneven else kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
    }
    if family.experts:
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        keys |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        if family.expert_width is not None:
            keys["expert_feed_forward_length"] = getattr(config, family.expert_width)
    if family.window:
        keys["attention.sliding_window"] = window
        keys["attention.sliding_window_pattern"] = sliding_period(config)
    return keys


def file_type(kinds: Iterable[GGMLQuantizationType]) -> int:
    """Return `general.file_type`, after the most frequent type of the matrices."""
    most, _ = Counter(kinds).most_common(1)[0]
    return int(FILE_TYPES[most])
