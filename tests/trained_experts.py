"""A small mixture of experts that is trained, on texts of a random Markov chain."""

from pathlib import Path

import torch
from tests.tiny_experts import tiny_experts
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WORDS, LENGTH, EXPERTS = 64, 64, 6


def markov_text(n_windows: int) -> Tensor:
    """Sample from a random Markov chain of second order, [n_windows, LENGTH]."""
    g = torch.Generator().manual_seed(0)
    first, second = 1.5 * torch.randn(2, WORDS, WORDS, generator=g)
    tokens = torch.randint(WORDS, (n_windows, LENGTH), generator=g)
    for t in range(2, LENGTH):
        scores = first[tokens[:, t - 1]] + second[tokens[:, t - 2]]
        tokens[:, t] = torch.multinomial(scores.softmax(-1), 1, generator=g)[:, 0]
    return tokens


def train_experts(folder: Path, text: Tensor, *, layers: int, steps: int) -> float:
    """Train a model on a text and save both; return the last loss, of which 4.16 is uniform."""
    sizes = {"vocab_size": WORDS, "num_experts": EXPERTS, "initializer_range": 0.02}
    model = tiny_experts("qwen3_moe", num_hidden_layers=layers, **sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = text[torch.randint(len(text), (16,), generator=g)]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words = models.WordLevel({str(n): n for n in range(WORDS)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)
    rows = [" ".join(map(str, row)) for row in text.tolist()]
    (folder / "text.txt").write_text("\n\n".join(rows), encoding="utf-8")
    return float(loss.detach())
