"""A dense model that guesses is reported before the work."""

import pytest
import torch

from lrc.compressors.evaluate.broken_source import check_source_model, near_uniform
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Perplexity

SPEC = Perplexity(source="python-docs", window=64)


def test_a_model_that_guesses_gets_a_warning(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    (warning,) = check_source_model(lambda: model, tiny_tokenizer, SPEC)
    assert warning.startswith("near-uniform-model: ")
    assert "perplexity 512 on python-docs" in warning


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(tiny_llama, tiny_tokenizer, value):
    model = tiny_llama()
    model.lm_head.weight.data[7].fill_(value)
    with pytest.raises(ModelError, match=r"model\.path: lm_head\.weight holds NaN or Inf"):
        check_source_model(lambda: model, tiny_tokenizer, SPEC)


def test_logits_that_overflow_are_an_error(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    model.lm_head.weight.data.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(ModelError) as caught:
        check_source_model(lambda: model, tiny_tokenizer, SPEC)
    assert caught.value.code == "broken-source"


def test_only_what_is_close_to_chance_is_suspicious():
    found = near_uniform({"a": 20.0, "b": 255.0, "c": 257.0, "d": 1e9, "e": None}, 512)
    assert [warning.split(" on ")[1][0] for warning in found] == ["c", "d"]
