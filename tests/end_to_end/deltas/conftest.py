"""Tiny models, a tuned one and an adapter, and the command that makes their deltas."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM


@pytest.fixture(scope="package")
def models(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folders `base`, `tuned` (everything but the embedding), `other` and `adapter`."""
    folder = tmp_path_factory.mktemp("deltas")
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    tiny_llama(seed=1).save_pretrained(folder / "other")
    g = torch.Generator().manual_seed(0)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "embed" not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    tuned.generation_config.max_new_tokens = 7
    tuned.save_pretrained(folder / "tuned")
    make_tokenizer().save_pretrained(folder / "tuned")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=8,
            lora_alpha=12,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 4},
            alpha_pattern={"layers.0.mlp.down_proj": 5},
            use_rslora=True,
            init_lora_weights=False,
        )
        peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def make(lrc: Callable[..., Any], models: Path) -> Callable[..., dict[str, Any]]:
    """Make a delta of models by name; return what is printed as JSON."""

    def run(tuned: str | Path, out: Path, method: str, *options: str) -> dict[str, Any]:
        ended = lrc(
            *("delta", "make", models / "base", models / tuned, out, *options),
            *("--method", method, "--json", "-q"),
        )
        assert ended.code == 0, ended.err
        found: dict[str, Any] = json.loads(ended.out)
        return found

    return run
