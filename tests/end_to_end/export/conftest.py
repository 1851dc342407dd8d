"""Tiny models whose rows are whole blocks of GGUF, and checkpoints of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}


def quantize(**options: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", **options}}


def decompose(method: str, **options: Any) -> dict[str, Any]:
    return {"decompose": {"method": method, "keep": 0.6, **options}}


INT8 = quantize(bits=8, embeddings="int8")
UNEVEN = {
    "slice": {
        "method": "modegpt",
        "uniform": False,
        "allocation": "lagrangian",
        "heads": False,
        "keep": 0.9,
        "width_multiple": 32,
    }
}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "plain": [quantize(bits=4, group_size=32)],  # in the format of compressed-tensors
    "int8": [quantize(bits=8, ignore=["*.1.mlp.up_proj"])],
    "embedded": [quantize(bits=3, embeddings="int8")],
    "asymmetric": [quantize(bits=4, group_size=32, symmetric=False)],
    "mixed": [
        {
            "decompose": {
                "method": "mixed",
                "keep": 0.33,
                "components": ["dense"],
                "schemes": ["int8-g32", "int5-g32", "int4-g32"],
                "embeddings": "int8",
            }
        }
    ],
    "factors": [decompose("svd-llm")],
    "elastic": [{"decompose": {"method": "svd-llm", "elastic": [0.9, 0.6]}}],
    "refined": [{"decompose": {"method": "kfac", "elastic": [0.9, 0.6]}}],
    "shared": [decompose("basis-sharing")],
    "sparse": [decompose("sparse")],
    "biases": [decompose("lord")],
    "narrow-heads": [{"slice": {"method": "modegpt", "keep": 0.7, "width_multiple": 2}}],
    "uneven": [UNEVEN],
    "uneven-integers": [UNEVEN, INT8],
    "rotated": [
        {"slice": {"method": "slicegpt", "keep": 0.9, "width_multiple": 32, "rotations": "global"}}
    ],
    "rotated-blocks": [
        {"slice": {"method": "slicegpt", "keep": 0.9, "width_multiple": 1, "rotations": "block"}}
    ],
    "small-groups": [quantize(bits=4, group_size=16)],
}


@pytest.fixture(scope="session")
def source(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_llama(**WIDE, tie_word_embeddings=True).save_pretrained(folder)
    make_tokenizer(chat_template="{{ messages }}").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(
    source: Path, tiny_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Compress the tiny model by a recipe of the table, once."""
    base = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        output = base / name
        if not output.exists():
            recipe = tiny_recipe(source, output, stages=RECIPES[name])
            compress(load_recipe(recipe), Machine("cpu"))
        return output / "checkpoint"

    return run


@pytest.fixture(scope="session")
def save_family(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> Callable[..., Any]:
    """Save a random model of a family with its tokenizer; keywords go to its configuration."""

    def save(folder: Path, **changes: Any) -> Any:
        options = {
            "model_type": "llama",
            "vocab_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **WIDE,
            **changes,
        }
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):  # ones and zeros would hide mistakes
                    torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return model

    return save
