"""Tiny random models in float64 of every family whose residual stream is known."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

sys.path.append(str(Path(__file__).parent / "oracles"))

WIDTH = 32
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {**COMMON, "intermediate_size": 40, "num_key_value_heads": 2}
PLAIN = {**COMMON, "intermediate_size": 40}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama-biased": lambda: LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**GROUPED, head_dim=10),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3-tied": lambda: Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**GROUPED, head_dim=8),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=40, dropout=0.0),
    "opt-unbiased": lambda: OPTConfig(**COMMON, ffn_dim=40, enable_bias=False),
    "gpt_neox": lambda: GPTNeoXConfig(**PLAIN),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(**PLAIN, use_parallel_residual=False),
    "phi": lambda: PhiConfig(**PLAIN),
    "phi-normed-heads": lambda: PhiConfig(**PLAIN, qk_layernorm=True),
}


def build(config: PreTrainedConfig, *, seed: int = 0) -> Any:
    """Build a model with random parameters, including norms and biases."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    return _exact(model)


def _exact(model: Any) -> Any:
    """Let norms compute in float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _in_float64(module, type(module).__name__ == "GemmaRMSNorm")
    return model


def _in_float64(norm: Any, is_gemma: bool) -> Callable[[Tensor], Tensor]:
    """Compute as the class does, but without rounding to float32 first."""

    def forward(x: Tensor) -> Tensor:
        eps = norm.eps if is_gemma else norm.variance_epsilon
        normal = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return normal * (1 + norm.weight if is_gemma else norm.weight)

    return forward


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    return build(CONFIGS[request.param]())


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return build


@pytest.fixture
def exact() -> Callable[[Any], Any]:
    return _exact


@pytest.fixture
def configs() -> dict[str, Callable[[], PreTrainedConfig]]:
    return CONFIGS


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 64, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def random_rotation() -> Callable[[int], Tensor]:
    """Return an orthogonal float64 matrix by its seed."""

    def make(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(noise).Q

    return make
