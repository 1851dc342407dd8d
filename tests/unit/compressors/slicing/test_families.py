"""Which architectures can be rotated, and the errors for others."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
)

from lrc.compressors.slicing.families import FAMILIES, find_family
from lrc.configs.errors import ModelError

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}


def skeleton(config):
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_every_family_is_tested(configs):
    assert {make().model_type for make in configs.values()} == set(FAMILIES)


def test_every_linear_of_a_layer_is_found_or_is_inside_a_block(model):
    """Every side of width D belongs to a reader or a writer."""
    family = find_family(model)
    readers = {name for norm in family.norms(model) for name in norm.readers}
    writers = {name for block in family.stream(model) for name in block.writers}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            inner = {name} - readers - writers
            assert not inner, name


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, intermediate_size=16),
        Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, intermediate_size=16),
        Olmo2Config(**SMALL, intermediate_size=16, pad_token_id=None),
    ],
    ids=lambda config: config.model_type,
)
def test_a_norm_after_the_output_matrix_is_refused(config):
    with pytest.raises(ModelError, match=r"between a block's output matrix and the residual"):
        find_family(skeleton(config))


def test_an_unknown_family_is_refused_and_the_known_are_named():
    config = GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=32)
    with pytest.raises(ModelError, match=r"'gpt2'.*llama, mistral, opt, phi, qwen2, qwen3"):
        find_family(skeleton(config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"word_embed_proj_dim": 8}, "projected from width 8 to 16"),
        ({"do_layer_norm_before": False}, "applied to the residual stream"),
        ({"_remove_final_layer_norm": True}, "applied to the residual stream"),
    ],
)
def test_opt_models_with_another_stream_are_refused(changes, reason):
    config = OPTConfig(**SMALL, ffn_dim=16, pad_token_id=None, **changes)
    with pytest.raises(ModelError, match=reason):
        find_family(skeleton(config))


def test_a_module_tree_that_differs_from_the_family_is_refused():
    model = skeleton(LlamaConfig(**SMALL, intermediate_size=16, pad_token_id=None))
    model.model.layers[0].mlp.down_proj = nn.Identity()
    model.model.norm = nn.LayerNorm(16)
    with pytest.raises(ModelError) as refused:
        find_family(model)
    assert "model.layers.0.mlp.down_proj is not Linear with out_features=16" in str(refused.value)
    assert "model.norm is not RMSNorm of width 16" in str(refused.value)
