"""What is measured again, and what the journal already has."""

import pytest
import torch

from lrc.compressors.evaluate.baselines import Targets
from lrc.compressors.evaluate.evaluator import Evaluator
from lrc.compressors.evaluate.streaming_rule import ModelBytes
from lrc.compressors.io.journal import open_journal
from lrc.compressors.io.machine import Clock, no_progress
from lrc.configs.recipe import Evaluate, Perplexity

CPU = {"dtype": "torch.float32", "device": "cpu"}
GPU = {"dtype": "torch.bfloat16", "device": "cuda"}
PAIR_LOADED = ["dense", "compressed"]
# One after the other, both together, and the dense model for a baseline.
ALL_LOADED = ["dense", "compressed", *PAIR_LOADED, "dense"]


@pytest.fixture
def evaluate(tiny_llama, tiny_tokenizer, tmp_path):
    """Evaluate in one journal; returns the result and the names of the models that were loaded."""

    def run(precision, compressed=tiny_llama, pair_bytes=0, **changes):
        dtype = getattr(torch, precision["dtype"].removeprefix("torch."))
        loaded = []

        def load(name, make=tiny_llama):
            def loader():
                loaded.append(name)
                return make().to(dtype)

            return loader

        options = Evaluate(
            perplexity=[Perplexity(source="python-docs", window=32, windows=1)],
            **{"baselines": ["int8"], **changes},
        )
        with open_journal(tmp_path / "run", {}) as journal:
            evaluator = Evaluator(
                options,
                seed=0,
                journal=journal,
                clock=Clock(journal),
                on_step=no_progress,
                precision=precision,
                sizes=ModelBytes(0, pair_bytes),
                load_tokenizer=lambda: tiny_tokenizer,
                load_dense=load("dense"),
                load_compressed=load("compressed", compressed),
            )
            targets = Targets({"model.layers.0.mlp.up_proj": (48, 32)}, torch.float32, 9, 9)
            return evaluator.add_baselines(evaluator.evaluate(targets), targets), loaded

    return run


def test_scores_of_another_precision_are_measured_again(evaluate):
    result, loaded = evaluate(GPU)
    assert loaded == ALL_LOADED
    assert result["perplexity"]["python-docs"]["dtype"] == "bfloat16"
    assert evaluate(GPU) == (result, [])
    # The advice after an out-of-memory error is --device cpu, where models run in float32.
    result, loaded = evaluate(CPU)
    assert loaded == ALL_LOADED
    assert result["perplexity"]["python-docs"]["dtype"] == "float32"
    assert result["perplexity"]["python-docs"]["ratio"] == 1


def test_what_is_missing_is_listed_and_tried_again(evaluate, tiny_llama):
    def damaged():
        model = tiny_llama()
        model.lm_head.weight.data[7].fill_(torch.nan)
        return model

    result, _ = evaluate(CPU, damaged)
    assert (result["perplexity"], result["baselines"]) == ({}, [])
    assert [(each["model"], each["metric"]) for each in result["missing"]] == [
        ("compressed", "perplexity.python-docs"),
        ("compressed", "kl.python-docs"),
    ]
    result, loaded = evaluate(CPU)
    assert loaded == ["compressed", *PAIR_LOADED, "dense"]
    assert (result["missing"], result["perplexity"]["python-docs"]["ratio"]) == ([], 1)


def test_the_comparison_of_predictions_is_kept_on_its_own(evaluate):
    result, _ = evaluate(CPU)
    entry = result["kl"]["python-docs"]
    assert (entry["forward"], entry["reverse"], entry["agreement"]) == (0, 0, 1)
    assert (entry["tokens"], entry["windows"], entry["stderr"]) == (31, 1, None)
    assert evaluate(CPU) == (result, [])
    result, loaded = evaluate(CPU, kl_tokens=64)  # perplexities stay
    assert loaded == PAIR_LOADED
    assert result["kl"]["python-docs"] == entry
    result, loaded = evaluate(CPU, kl_tokens=0)
    assert (result["kl"], loaded) == ({}, [])
    result, loaded = evaluate(CPU, kl_tokens=64, dense=False, baselines=[])
    assert (result["kl"], result["missing"], loaded) == ({}, [], [])


def test_models_that_do_not_fit_together_cost_only_their_comparison(evaluate, tiny_llama):
    def large():
        seen.append("compressed")
        if len(seen) > 1:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return tiny_llama()

    seen = []
    result, _ = evaluate(GPU, large, generations=["a"])
    assert result["perplexity"]["python-docs"]["ratio"] == 1
    assert len(result["baselines"]) == 1
    assert (result["kl"], result["generations"]) == ({}, [])
    assert [each["metric"] for each in result["missing"]] == ["kl.python-docs", "generations.0"]
    for each in result["missing"]:
        assert each["model"] == "compressed"
        assert "do not fit into memory at the same time (tried to allocate 9 GiB)" in each["reason"]
        assert "set kl_tokens to 0" in each["reason"]
    result, loaded = evaluate(GPU, generations=["a"])  # where there is more memory
    assert (result["missing"], loaded) == ([], PAIR_LOADED)
    assert result["kl"]["python-docs"]["agreement"] == 1
    assert result["generations"][0]["first_difference"] is None


def test_a_host_without_the_memory_for_both_does_not_try(evaluate):
    result, loaded = evaluate(CPU, pair_bytes=2**60)
    assert loaded == ["dense", "compressed", "dense"]
    (missing,) = result["missing"]
    assert missing["metric"] == "kl.python-docs"
    assert "they take at least 1073741824.0 GiB" in missing["reason"]
    _, loaded = evaluate(GPU, pair_bytes=2**60)  # which raises an error by itself
    assert loaded == ALL_LOADED
