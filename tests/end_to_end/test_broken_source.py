"""A source model that is no better than chance is named before compression and in the report."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def damage(tiny_model_folder, tmp_path):
    def change(value):
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"].fill_(value)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


@pytest.fixture
def recipe(tiny_recipe, tiny_text, tmp_path):
    def write(folder):
        perplexity = [{"source": str(tiny_text), "window": 64, "windows": 2}]
        return tiny_recipe(
            folder,
            tmp_path / "run",
            evaluate={"perplexity": perplexity, "baselines": []},
            stages=[{"quantize": {"method": "rtn", "bits": 8}}],
        )

    return write


def test_a_model_that_guesses_is_named(lrc, damage, recipe, tmp_path):
    ended = lrc("compress", recipe(damage(0.0)))
    assert ended.code == 0
    first, *_ = ended.err.splitlines()
    assert first.startswith("warning: near-uniform-model: ")
    warnings = json.loads((tmp_path / "run/report.json").read_text())["warnings"]
    assert [warning.split(":")[0] for warning in warnings] == ["near-uniform-model"]


def test_a_model_without_finite_weights_is_refused(lrc, damage, recipe, tmp_path):
    ended = lrc("compress", recipe(damage(float("inf"))))
    ended.refuses(1, "lm_head.weight", code="invalid-model", where="model.path")
    assert not (tmp_path / "run/checkpoint").exists()
