"""Perplexity: the number, its memory, its refusals."""

import math

import accelerate
import pytest
import torch

from lrc.compressors.corpus.windows import Windows, evaluation_windows
from lrc.compressors.evaluate import logits
from lrc.compressors.evaluate import perplexity as module
from lrc.compressors.evaluate.logits import head_gives_logits
from lrc.compressors.evaluate.perplexity import perplexity
from lrc.configs.errors import DataError, ModelError, RecipeError
from lrc.configs.recipe import Perplexity


@pytest.fixture
def tokens():
    return torch.randint(2, 512, (3, 40), generator=torch.Generator().manual_seed(1))


def straightforward(model, tokens):
    """Full logits, float64, one mean over everything."""
    with torch.no_grad():
        logits = torch.cat([model(ids[None]).logits for ids in tokens])
    logp = logits[:, :-1].double().log_softmax(-1)
    return math.exp(-logp.gather(-1, tokens[:, 1:, None]).mean().item())


def test_uniform_logits_give_the_size_of_the_vocabulary(tiny_llama, tokens):
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tokens).perplexity == pytest.approx(512, rel=1e-6)


def test_the_standard_error_is_that_of_independent_windows(tiny_llama, tokens):
    model = tiny_llama()
    whole = perplexity(model, tokens)
    alone = [perplexity(model, window[None]) for window in tokens]
    means = torch.tensor([each.nll_mean for each in alone], dtype=torch.float64)
    expected = float(means.std(correction=1) / 3**0.5) * whole.perplexity
    assert whole.stderr == pytest.approx(expected, rel=1e-6)
    assert alone[0].stderr is None


@pytest.mark.parametrize("piece", [7, 39, 256])
def test_pieces_give_what_full_logits_give(tiny_llama, tokens, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    model = tiny_llama()
    result = perplexity(model, tokens)
    assert result.perplexity == pytest.approx(straightforward(model, tokens), rel=1e-6)
    assert result.nll_mean == pytest.approx(math.log(result.perplexity), rel=1e-12)
    assert (result.tokens, result.window, result.windows) == (3 * 39, 40, 3)
    assert (result.bos, result.dtype) == (False, "float32")


@pytest.mark.parametrize("budget", [512 * 10, 2**28])
def test_capped_logits_take_the_fallback_and_agree(tiny_gemma, tokens, monkeypatch, budget):
    monkeypatch.setattr(module, "FALLBACK_LOGITS", budget)
    monkeypatch.setattr(module, "PIECE", 8)
    model = tiny_gemma()
    assert not head_gives_logits(model, tokens[0])
    expected = straightforward(model, tokens)
    assert perplexity(model, tokens).perplexity == pytest.approx(expected, rel=1e-6)
    uncapped = tiny_gemma(cap=None)
    assert head_gives_logits(uncapped, tokens[0])
    assert straightforward(uncapped, tokens) > 1.1 * expected  # the cap matters here


def test_a_model_that_cannot_select_logits_is_measured_whole(tiny_llama, tokens):
    model = tiny_llama()
    expected = straightforward(model, tokens)
    whole = model.forward
    model.forward = lambda input_ids, use_cache: whole(input_ids, use_cache=use_cache)
    model.get_output_embeddings = lambda: None
    assert perplexity(model, tokens).perplexity == pytest.approx(expected, rel=1e-6)


def test_logits_exist_only_in_pieces(tiny_llama, tokens, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 10)
    monkeypatch.setattr(logits, "PROBE", 10)
    model, rows = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda _m, _x, y: rows.append(y.shape[-2]))
    perplexity(model, tokens)
    assert max(rows) == 10


def test_with_bos_every_text_token_is_predicted(tiny_llama, make_tokenizer):
    spec = Perplexity(source="python-docs", window=32, windows=2)
    windows = evaluation_windows(spec, make_tokenizer(bos=True))
    model = tiny_llama()
    result = perplexity(model, windows)
    assert (result.tokens, result.window, result.bos) == (64, 32, True)
    assert result.perplexity == pytest.approx(straightforward(model, windows.tokens), rel=1e-6)


def test_bfloat16_is_close_to_float32_and_named(tiny_llama, tokens):
    model = tiny_llama()
    exact = perplexity(model, tokens).nll_mean
    result = perplexity(model.to(torch.bfloat16), tokens)
    assert result.nll_mean == pytest.approx(exact, rel=5e-3)  # measured: 3e-4
    assert result.dtype == "bfloat16"


def test_weights_off_the_device_change_nothing(tiny_llama, tokens):
    expected = perplexity(tiny_llama(), tokens).perplexity
    model = accelerate.cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert perplexity(model, tokens).perplexity == expected


def test_progress_is_told_after_every_window_and_may_stop(tiny_llama, tokens):
    steps = []
    perplexity(tiny_llama(), tokens, on_window=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]

    def stop(done, total):
        raise KeyboardInterrupt

    model = tiny_llama().train()
    with pytest.raises(KeyboardInterrupt):
        perplexity(model, tokens, on_window=stop)
    assert model.training


def test_a_window_without_finite_likelihood_is_named_not_dropped(tiny_llama, tokens):
    model = tiny_llama()
    tokens[1, 5] = 3
    tokens[0][tokens[0] == 3] = 4
    model.model.embed_tokens.weight.data[3] = torch.inf
    with pytest.raises(ModelError, match="window 2 of 3 is nan"):
        perplexity(model, tokens)


def test_an_overflowing_perplexity_is_an_error(tiny_llama, tokens):
    model = tiny_llama()
    model.lm_head.weight.data *= 1e4
    with pytest.raises(ModelError, match="overflows"):
        perplexity(model, tokens)


def test_foreign_tokens_are_refused(tiny_llama, tokens):
    with pytest.raises(DataError, match="gives token 600, the model has 512"):
        perplexity(tiny_llama(), tokens.clone().index_fill_(1, torch.tensor([0]), 600))


def test_windows_that_do_not_fit_the_context_are_refused(tiny_llama):
    model = tiny_llama(max_position_embeddings=16)
    with pytest.raises(RecipeError, match=r"at most 16, the model's context, got 17"):
        perplexity(model, torch.zeros(1, 17, dtype=torch.int64))
    with_bos = Windows(torch.zeros(1, 17, dtype=torch.int64), "x", "", True, 17)
    assert perplexity(model, with_bos).window == 16
    with pytest.raises(RecipeError, match="at least 2"):
        perplexity(model, torch.zeros(1, 1, dtype=torch.int64))


def test_the_same_model_measures_the_same_twice(tiny_llama, tokens):
    assert perplexity(tiny_llama(), tokens) == perplexity(tiny_llama(), tokens)
