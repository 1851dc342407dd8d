"""Tokens in a batch, and what a backward pass keeps of them."""

from types import SimpleNamespace
from typing import Any

import pytest

from lrc.compressors.calibrate.batch_size import (
    BACKWARD_BYTES,
    BATCH_TOKENS,
    backward_bytes,
    batch_tokens,
)
from lrc.compressors.models.architecture import Linear

LENGTH = 1024


def shapes(width: int, heads: int, outputs: dict[str, int], **more: Any) -> Any:
    """Return what batch sizes need to know of a model of two equal layers."""
    config = SimpleNamespace(hidden_size=width, num_attention_heads=heads)
    config.get_text_config = lambda: config
    linears = [
        Linear(f"layers.{layer}.{name}", layer, d_out, width, False)
        for layer in range(2)
        for name, d_out in outputs.items()
    ]
    facts = {"layer_names": ["layers.0", "layers.1"], "linears": linears, "experts": {}} | more
    return SimpleNamespace(model=SimpleNamespace(config=config), **facts)


LLAMA_8B = shapes(
    4096, 32, {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336, "down": 4096}
)
SMOLLM2 = shapes(
    576, 9, {"q": 576, "k": 192, "v": 192, "o": 576, "gate": 1536, "up": 1536, "down": 576}
)


def test_wide_models_have_smaller_batches_on_a_gpu() -> None:
    assert batch_tokens(SMOLLM2, "cuda", 128, LENGTH) == BATCH_TOKENS["cuda"]
    tokens = batch_tokens(LLAMA_8B, "cuda", 128, LENGTH)
    assert 4 * LENGTH <= tokens < 5 * LENGTH
    assert tokens * backward_bytes(LLAMA_8B, "cuda", LENGTH) <= BACKWARD_BYTES
    assert batch_tokens(LLAMA_8B, "cpu", 128, LENGTH) == BATCH_TOKENS["cpu"]


def test_a_batch_has_a_window_at_least() -> None:
    assert batch_tokens(LLAMA_8B, "cuda", 128, 32768) == 32768
    assert batch_tokens(SMOLLM2, "cpu", 4, LENGTH) == LENGTH


def test_eight_batches_are_made_if_there_are_so_many_windows() -> None:
    assert batch_tokens(SMOLLM2, "cuda", 16, LENGTH) == 2 * LENGTH


@pytest.mark.parametrize("selected", [1, 2, 8])
def test_experts_count_as_often_as_tokens_use_them(selected: int) -> None:
    outputs = {f"experts.{n}.up": 100 for n in range(8)}
    experts = {f"layers.{layer}.experts": (8, selected) for layer in range(2)}
    sparse = shapes(64, 4, outputs, experts=experts)
    dense = shapes(64, 4, {"up": 100 * selected})
    assert backward_bytes(sparse, "cpu", 32) == backward_bytes(dense, "cpu", 32)
