"""A model of some layers, and recipes for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.estimated_recipes import INNER, LAYERS, RATES, WIDTH
from transformers import LlamaForCausalLM

from lrc.compressors.estimates import estimate as estimates
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.stages import STAGES
from lrc.configs.load import load_recipe


@pytest.fixture(scope="module")
def model_folder(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide"
    model = tiny_llama(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def written(
    model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """Write a recipe for the model."""

    def write(stages: list[dict[str, Any]], **changes: Any) -> Path:
        return tiny_recipe(model_folder, tmp_path / "run", stages=stages, **changes)

    return write


@pytest.fixture
def prepared(written: Callable[..., Path]) -> Callable[..., Prepared]:
    return lambda *given, **changes: prepare(load_recipe(written(*given, **changes)).recipe, STAGES)


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "measure_rates", lambda *_: RATES)
