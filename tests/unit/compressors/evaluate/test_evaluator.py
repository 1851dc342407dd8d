"""What is measured again, and what the journal already has."""

import pytest
import torch

from lrc.compressors.evaluate.baselines import Targets
from lrc.compressors.evaluate.evaluator import Evaluator
from lrc.compressors.io.journal import open_journal
from lrc.compressors.io.machine import Clock, no_progress
from lrc.configs.recipe import Evaluate, Perplexity

CPU = {"dtype": "torch.float32", "device": "cpu"}
GPU = {"dtype": "torch.bfloat16", "device": "cuda"}


@pytest.fixture
def evaluate(tiny_llama, tiny_tokenizer, tmp_path):
    """Evaluate in one journal; returns the result and the names of the models that were loaded."""

    def run(precision, compressed=tiny_llama):
        dtype = getattr(torch, precision["dtype"].removeprefix("torch."))
        loaded = []

        def load(name, make=tiny_llama):
            def loader():
                loaded.append(name)
                return make().to(dtype)

            return loader

        options = Evaluate(
            perplexity=[Perplexity(source="python-docs", window=32, windows=1)], baselines=["int8"]
        )
        with open_journal(tmp_path / "run", {}) as journal:
            evaluator = Evaluator(
                options,
                seed=0,
                journal=journal,
                clock=Clock(journal),
                on_step=no_progress,
                precision=precision,
                load_tokenizer=lambda: tiny_tokenizer,
                load_dense=load("dense"),
                load_compressed=load("compressed", compressed),
            )
            targets = Targets({"model.layers.0.mlp.up_proj": (48, 32)}, torch.float32, 9, 9)
            return evaluator.add_baselines(evaluator.evaluate(), targets), loaded

    return run


def test_scores_of_another_precision_are_measured_again(evaluate):
    result, loaded = evaluate(GPU)
    assert loaded == ["dense", "compressed", "dense"]
    assert result["perplexity"]["python-docs"]["dtype"] == "bfloat16"
    assert evaluate(GPU) == (result, [])
    # The advice after an out-of-memory error is --device cpu, where models run in float32.
    result, loaded = evaluate(CPU)
    assert loaded == ["dense", "compressed", "dense"]
    assert result["perplexity"]["python-docs"]["dtype"] == "float32"
    assert result["perplexity"]["python-docs"]["ratio"] == 1


def test_what_is_missing_is_listed_and_tried_again(evaluate, tiny_llama):
    def damaged():
        model = tiny_llama()
        model.lm_head.weight.data[7].fill_(torch.nan)
        return model

    result, _ = evaluate(CPU, damaged)
    assert (result["perplexity"], result["baselines"]) == ({}, [])
    (missing,) = result["missing"]
    assert (missing["model"], missing["metric"]) == ("compressed", "perplexity.python-docs")
    result, loaded = evaluate(CPU)
    assert loaded == ["compressed", "dense"]
    assert (result["missing"], result["perplexity"]["python-docs"]["ratio"]) == ([], 1)
