"""The oracle: sizes of sliced models equal those that the paper's own code asserts."""

import pytest
from paper_size import count_sliced
from rotated_model import fuse_norms_, rotate_blocks_
from transformers import LlamaConfig, OPTConfig, PhiConfig, Qwen2Config

from lrc.compressors.slicing.families import find_family
from lrc.configs.errors import ModelError

OPT_125M = OPTConfig(
    vocab_size=50272,
    hidden_size=768,
    num_hidden_layers=12,
    ffn_dim=3072,
    num_attention_heads=12,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
PHI_2 = PhiConfig(
    vocab_size=51200,
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    partial_rotary_factor=0.4,
    tie_word_embeddings=False,
)
LLAMA_2_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008)


@pytest.mark.parametrize(
    ("config", "sliced"), [(OPT_125M, 147_250_880), (PHI_2, 2_391_772_160)], ids=["opt", "phi"]
)
def test_counts_are_those_of_the_papers_code(config, sliced):
    """tests/test_experiments.py of microsoft/TransformerCompression asserts both, at 20 %."""
    assert count_sliced(config, 0.2).sliced == sliced


def test_twenty_percent_slicing_of_llama_removes_nine_percent():
    count = count_sliced(LLAMA_2_7B, 0.2)
    assert count.dense == 6_738_415_616
    assert 1 - count.sliced / count.dense == pytest.approx(0.094, abs=5e-4)


def test_a_small_model_with_a_tied_head_grows_by_slicing():
    """OPT-125M by 17.6 % at "20 %"; Qwen2.5-0.5B even at "30 %"."""
    opt = count_sliced(OPT_125M, 0.2)
    assert opt.sliced / opt.dense - 1 == pytest.approx(0.176, abs=5e-4)
    qwen = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    growth = [count_sliced(qwen, s) for s in (0.2, 0.25, 0.3)]
    assert growth[0].dense == 494_032_768
    assert [c.sliced / c.dense - 1 for c in growth] == pytest.approx(
        [0.1215, 0.072, 0.013], abs=5e-4
    )


def test_a_rotated_model_has_as_many_parameters_as_counted(model, random_rotation):
    """At full width every tensor is there; a head's bias that a norm gave it, too."""
    count = count_sliced(model.config, 0.0)
    assert count.dense == sum(p.numel() for p in model.parameters())
    family = find_family(model)
    fuse_norms_(model, family)
    n_blocks = len(family.stream(model))
    rotate_blocks_(model, family, [random_rotation(seed) for seed in range(n_blocks + 1)])
    assert count.sliced == sum(p.numel() for p in model.parameters())
    assert count.shortcuts == n_blocks * 32 * 32


def test_what_cannot_be_rotated_is_not_counted():
    with pytest.raises(ModelError, match="cannot be rotated"):
        count_sliced(OPTConfig(word_embed_proj_dim=512), 0.2)
