"""What tests of deltas compare: weights and logits of tiny models."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TOKENS = torch.arange(2, 34)[None]
MATRIX = "model.layers.0.self_attn.q_proj.weight"
METHODS: dict[str, list[str]] = {
    "ternary": ["density=0.2"],
    "low-rank": ["rank=4"],
    "int": ["bits=3", "group_size=16"],
    "sparse": ["density=0.1"],
}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
