"""Transformers computes the frequencies of the kept pairs from the config."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

from lrc.compressors.slicing.rope import frequencies, table_parameters

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}
SIZES |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "max_position_embeddings": 256}
PAIRS = [0, 1, 3, 8, 9, 15, 22, 31]
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "large base": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def narrowed(config: LlamaConfig, pairs: list[int]) -> LlamaConfig:
    table = frequencies(LlamaForCausalLM(config), config)
    assert not isinstance(table, str)
    parameters = table_parameters(
        config.rope_parameters, table[0], pairs, scale=table[1], max_positions=256
    )
    saved = {**config.to_dict(), "head_dim": 2 * len(pairs), "rope_parameters": parameters}
    return LlamaConfig(**saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [200, 256, 300])
def test_the_table_is_that_of_the_kept_pairs_however_long_the_text(kind, length):
    config = LlamaConfig(**SIZES, rope_parameters=dict(KINDS[kind]))
    before, after = LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(narrowed(config, PAIRS))
    x, positions = torch.zeros(1, length, 128), torch.arange(length)[None]
    dims = [*PAIRS, *(pair + 32 for pair in PAIRS)]
    # A frequency is a power in float32, good to an ulp or two on either side; an angle is that many
    # times its position, and is rounded itself; and tables are multiplied by the scaling.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(after.inv_freq, before.inv_freq[PAIRS], rtol=4 * eps, atol=0)
    angle = (4 + 1) * eps * length * before.attention_scaling
    for wide, small in zip(before(x, positions), after(x, positions), strict=True):
        torch.testing.assert_close(small, wide[..., dims], rtol=0, atol=angle)


def test_all_pairs_keep_the_parameters():
    parameters = KINDS["llama3"]
    same = table_parameters(parameters, torch.ones(4), range(4), scale=1.0, max_positions=256)
    assert same == parameters


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "changes with the length"),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 32,
                "long_factor": [2.0] * 32,
                "original_max_position_embeddings": 64,
            },
            "changes with the length",
        ),
    ],
)
def test_a_table_that_changes_is_refused(parameters, reason):
    config = LlamaConfig(**SIZES, rope_parameters=parameters)
    assert reason in frequencies(LlamaForCausalLM(config), config)


def test_a_model_without_rotary_embedding_is_refused():
    config = OPTConfig(
        hidden_size=16, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    assert frequencies(OPTForCausalLM(config), config) == "it has no rotary embedding"


def test_a_partly_rotated_head_is_refused():
    config = GPTNeoXConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        rotary_pct=0.25,
    )
    assert "only a part" in frequencies(GPTNeoXForCausalLM(config), config)
