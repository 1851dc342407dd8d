"""Embeddings of integers: rows that are looked up, and heads that use the same integers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.checkpoint.tensor_checks import check_values
from lrc.compressors.layers import (
    ComponentConfig,
    CompressedEmbedding,
    QuantizationArgs,
    TiedHead,
    WeightConfig,
    sentinel,
)
from lrc.compressors.solvers.quantized_matrix import round_to_nearest

SCHEMES = ["int8", "int4-g16", "int5-g8", "int3-g8-asymmetric"]
VOCABULARY, WIDTH = 50, 32


def weight() -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))


def config_of(written: str, shape: tuple[int, int] = (VOCABULARY, WIDTH)) -> WeightConfig:
    return WeightConfig(shape, (ComponentConfig("dense", {}, QuantizationArgs.parse(written)),))


def embedded(written: str) -> CompressedEmbedding:
    model = nn.Module()
    model.embedding = nn.Embedding.from_pretrained(weight())
    replace_layers(model, {"embedding": config_of(written)})
    found = round_to_nearest(weight(), QuantizationArgs.parse(written), dtype=torch.float32)
    state = {f"embedding.dense.{leaf}": t for leaf, t in found.encode("weight").items()}
    model.load_state_dict({"embedding.weight": sentinel(), **state})
    check_values(model)
    module = model.embedding
    assert isinstance(module, CompressedEmbedding)
    return module


@pytest.mark.parametrize("written", SCHEMES)
def test_rows_that_are_looked_up_are_those_of_the_whole_matrix(written: str) -> None:
    module = embedded(written)
    args = QuantizationArgs.parse(written)
    whole = round_to_nearest(weight(), args, dtype=torch.float32).weight().float()
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    torch.testing.assert_close(module(ids), whole[ids])
    torch.testing.assert_close(module.dense_weight(), whole)
    assert module(ids).shape == (2, 3, WIDTH)
    assert (module.num_embeddings, module.embedding_dim) == (VOCABULARY, WIDTH)
    assert torch.equal(module.to_dense()(ids), module(ids))


@pytest.mark.parametrize("written", SCHEMES)
def test_a_tied_head_uses_the_same_integers(written: str) -> None:
    module = embedded(written)
    head, x = TiedHead(module), torch.randn(2, 3, WIDTH)
    assert torch.equal(head(x), x @ module.dense_weight().T)
    assert list(head.state_dict()) == list(head.parameters()) == []
    plain = module.to_dense()
    tied = head.to_dense(plain)
    assert tied.weight is plain.weight
    torch.testing.assert_close(tied(x), head(x))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_stay_tied_and_separate_heads_stay_separate(tied: bool, tiny_llama: Any) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    shape = tuple(model.model.embed_tokens.weight.shape)
    replace_layers(model, {"model.embed_tokens": config_of("int8", shape)})
    assert isinstance(model.lm_head, TiedHead) == tied
    assert ("lm_head.weight" in model.state_dict()) != tied
    if tied:
        assert model.lm_head.owner is model.model.embed_tokens
