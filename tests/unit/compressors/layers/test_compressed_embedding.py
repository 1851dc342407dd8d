"""Embeddings of integers: rows that are looked up, heads that read the same, rounding in pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.compress import embeddings as outside
from lrc.compressors.compress.layerwise import factors_file
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import EmbeddedIntegers, Scheme, TiedHead
from lrc.compressors.models.source import locate
from lrc.compressors.planning.compile import make_plan
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.configs.recipe import Model, Recipe

SCHEMES = ["int8", "int4-g16", "int5-g8", "int3-g8-asymmetric"]
WORDS, WIDTH = 50, 32


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def embedded(scheme: str) -> EmbeddedIntegers:
    embedding = nn.Embedding.from_pretrained(weight())
    module = EmbeddedIntegers.empty(embedding, {"form": "embedded_integers", "scheme": scheme})
    rounded = round_to_nearest(weight(), Scheme.read(scheme), dtype=torch.float32)
    module.load_state_dict(
        {"weight": torch.zeros(1, dtype=torch.uint8), **rounded.encode("weight")}
    )
    return module


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_are_looked_up_are_those_of_the_whole(scheme: str) -> None:
    module = embedded(scheme)
    whole = round_to_nearest(weight(), Scheme.read(scheme), dtype=torch.float32).weight().float()
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    torch.testing.assert_close(module(ids), whole[ids])
    torch.testing.assert_close(module.product(), whole)
    assert module(ids).shape == (2, 3, WIDTH)
    assert (module.num_embeddings, module.embedding_dim) == (WORDS, WIDTH)
    assert torch.equal(module.dense()(ids), module(ids))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_reads_the_same_integers(scheme: str) -> None:
    module = embedded(scheme)
    head, x = TiedHead(module), torch.randn(2, 3, WIDTH)
    assert torch.equal(head(x), x @ module.product().T)
    assert list(head.state_dict()) == list(head.parameters()) == []
    plain = module.dense()
    tied = head.dense(plain)
    assert tied.weight is plain.weight
    torch.testing.assert_close(tied(x), head(x))


@pytest.mark.parametrize("tied", [True, False])
def test_heads_stay_tied_and_heads_of_their_own_stay(tied: bool, tiny_llama: Any) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    spec = {"form": "embedded_integers", "scheme": "int8"}
    model.model.embed_tokens = EmbeddedIntegers.empty(model.model.embed_tokens, spec)
    model.model.embed_tokens.attach(model, spec)
    assert isinstance(model.lm_head, TiedHead) == tied
    assert ("lm_head.weight" in model.state_dict()) != tied
    if tied:
        assert model.lm_head.owner is model.model.embed_tokens


@pytest.mark.parametrize("scheme", ["int4-g16", "int3-g8-asymmetric"])
def test_rounding_in_pieces_is_rounding_at_once(
    scheme: str, source: Path, architecture: Any, reader: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    stage = {"quantize": {"method": "rtn", "targets": [], "embeddings": scheme}}
    model = Model(path=str(source), dtype="float32")
    recipe = Recipe.model_validate({"model": model, "stages": [stage], "output": "x"})
    journal = Journal(tmp_path / "run")
    journal.work.mkdir(parents=True)
    monkeypatch.setattr(outside, "NUMBERS", 100)  # a few rows
    plan = make_plan(recipe, locate(model), architecture)
    name = plan.outside[0].name
    W = reader.read(f"{name}.weight")
    done = outside.round_outside(plan, reader, journal, device="cpu").outside[0]
    rounded = round_to_nearest(W, Scheme.read(scheme), dtype=W.dtype)
    for leaf, tensor in rounded.encode("weight").items():
        stored = journal.read_tensor(factors_file(done.layer), f"{name}.{leaf}")
        assert torch.equal(stored, tensor), leaf
    error = float((W.double() - rounded.weight()).square().sum() / W.double().square().sum())
    assert done.loss == pytest.approx(error)
