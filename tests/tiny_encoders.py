"""Tiny random encoders with a tokenizer, and labelled examples for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = ["good", "bad", "film", "plot", "dull", "fine", "the", "a", "very", "not", "is", "was"]
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # so that predictions differ from uniform
    "pad_token_id": 1,
    "bos_token_id": 0,
    "cls_token_id": 0,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
FAMILIES: dict[str, Mapping[str, Any]] = {
    "bert": {},
    "roberta": {},
    # Local attention that is narrower than the texts, in every second layer.
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
}
LABELS = {0: "negative", 1: "positive", 2: "neutral"}


def tiny_encoder(family: str, *, classifies: bool, seed: int = 0, **changes: Any) -> Any:
    """Return a random model of a family, in eval mode."""
    labels = {"id2label": LABELS, "label2id": {name: n for n, name in LABELS.items()}}
    options = {**SIZES, **FAMILIES[family], **(labels if classifies else {}), **changes}
    config = AutoConfig.for_model(family, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = AutoModelForSequenceClassification if classifies else AutoModel
        model: Any = kind.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # zero when new; what does not show cannot be missed
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that puts special tokens around a text, or a pair of texts."""
    vocabulary = SPECIAL | {word: len(SPECIAL) + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=32,
    )


def write_examples(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Write a table of texts of 1 to 12 words with labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(1, 13, (1,), generator=generator))
        words = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        text = " ".join(WORDS[word] for word in words)
        rows.append({"sentence": text, "other": WORDS[number % 5], "label": number % len(LABELS)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_encoder(folder: Path, family: str, *, classifies: bool, **changes: Any) -> Path:
    """Save a tiny encoder with its tokenizer."""
    tiny_encoder(family, classifies=classifies, **changes).save_pretrained(folder)
    tiny_words().save_pretrained(folder)
    return folder
