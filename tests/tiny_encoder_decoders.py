"""Tiny random encoder-decoder models with a tokenizer, and pairs of texts for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tests.tiny_encoders import WORDS, tiny_words
from transformers import AutoConfig, AutoModelForSeq2SeqLM

SPECIAL_TOKENS = {
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
SIZES = {"vocab_size": 16, "d_model": 32, **SPECIAL_TOKENS}
BART: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "init_std": 0.3,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 48,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
FAMILIES: dict[str, Mapping[str, Any]] = {
    "t5": T5,
    "bart": BART,
    "mt5": {**T5, "feed_forward_proj": "gated-gelu"},
    "umt5": T5,
    "mbart": BART,
    "marian": BART,
    "pegasus": BART,
}


def tiny_encoder_decoder(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a random model of a family, in eval mode."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # zero when new; what does not show cannot be missed
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def save_encoder_decoder(folder: Path, family: str, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer."""
    tiny_encoder_decoder(family, **changes).save_pretrained(folder)
    tiny_words().save_pretrained(folder)
    return folder


def write_pairs(path: Path, count: int = 24) -> Path:
    """Write pairs of texts of different lengths."""
    lines = []
    for i in range(count):
        words = [WORDS[(i * k) % len(WORDS)] for k in range(1, 4 + i % 5)]
        target = [WORDS[(i + 3 * k) % len(WORDS)] for k in range(2 + (3 * i) % 7)]
        lines.append(json.dumps({"text": " ".join(words), "target": " ".join(target)}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
