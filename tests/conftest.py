"""What all tests share: no network, two threads, a tiny tokenizer and tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrc.compressors.corpus import read_documents

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE of 512 tokens; `bos=True` makes it start every text with <s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(read_documents("python-docs", part="calibration")[:20], trainer)
    plain = bpe.to_str()

    def make(*, bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(plain)
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            model_max_length=256,
            chat_template=chat_template,
        )

    return make


@pytest.fixture
def tiny_tokenizer(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Random Llama of 512 tokens and two layers, in eval mode; keywords go to its configuration."""

    def make(*, seed: int = 0, **changes: object) -> LlamaForCausalLM:
        config = LlamaConfig(
            **{
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": 0.2,  # large enough that predictions differ from uniform
                "bos_token_id": 0,
                "eos_token_id": 1,
                **changes,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder with the tiny Llama and its tokenizer. Shared: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., Path]:
    """Write a recipe for a tiny model beside its output folder; keywords replace top-level keys."""

    def write(folder: Path, output: Path, **changes: Any) -> Path:
        recipe = {
            "model": str(folder),
            "calibration": {"source": "python-docs", "samples": 4, "length": 64},
            "stages": [{"decompose": {"method": "svd-llm", "keep": 0.6}}],
            "output": str(output),
            **changes,
        }
        path = output.with_name(f"{output.name}.yaml")
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write
