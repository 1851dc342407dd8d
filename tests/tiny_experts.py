"""Tiny random models with mixtures of experts, as transformers stores them in different ways."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "gpt_oss": {  # transposed, with biases, gate and up interleaved
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {  # a dense layer first, a shared expert, latent attention
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {  # transposed; the experts receive all tokens, most of them zeros
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
    },
    "nemotron_h": {  # without a gate
        "layers_block_type": ["moe", "attention"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
    },
}


def tiny_experts(family: str, **changes: Any) -> Any:
    """Return a random model in eval mode, whose router favours none of its experts much."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("experts.", "router.", ".gate.")):
                    parameter.normal_(0, 0.2)
    return model


def save_experts(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a model and a tokenizer into a folder, as the family was published."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expert_weight(model: Any, name: str) -> Tensor:
    """Return the weight [d_out, d_in] of a linear or of an expert of a model, to be changed."""
    experts, _, rest = name.partition(".experts.")
    if not rest:
        found: Tensor = model.get_submodule(name).weight
        return found
    module = model.get_submodule(f"{experts}.experts")
    number, leaf = rest.split(".")
    found = getattr(module, leaf)[int(number)]
    return found.T if getattr(module, "is_transposed", True) else found  # Llama 4 has no such flag
