"""Statistics of a few layers at a time give the same checkpoint as those of all layers together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress, profile
from lrc.configs.errors import RecipeError, Stopped
from lrc.configs.load import load_recipe

LIMIT = 4e-5  # GiB; the statistics of one layer and the boundaries take about this much
STAGES = {
    "allocation with compensation": [
        {"decompose": {"method": "kfac", "keep": 0.7, "compensate": {}}}
    ],
    "allocation": [{"decompose": {"method": "mixed", "keep": 0.7}}],
    "gradients at fixed sizes": [
        {"decompose": {"method": "kfac", "keep": 0.6, "allocation": "uniform"}}
    ],
    "inputs at fixed sizes": [{"decompose": {"method": "svd-llm", "keep": 0.6}}],
    "gradients of the last layers": [
        {"decompose": {"method": "svd-llm", "keep": 0.6, "targets": ["*layers.[0-2].*"]}},
        {"decompose": {"method": "kfac", "keep": 0.6, "targets": ["*layers.[34].*"]}},
    ],
}


@dataclass
class Kept:
    """Counts layers whose statistics are on the disk, at the end of every step."""

    output: Path
    most: int = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        files = (self.output / "work" / "statistics").glob("inputs-*.safetensors")
        self.most = max(self.most, len([*files]))


@dataclass
class StopsAt:
    """Stops a run at the n-th step of a stage."""

    stage: str
    left: int

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.left -= stage == self.stage
        if self.left == 0:
            raise Stopped("stopped")


@pytest.fixture(scope="module")
def model_folder(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "five-layers"
    tiny_llama(num_hidden_layers=5).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_that_was_stopped_in_a_segment_gives_the_same_checkpoint(
    model_folder: Path, tiny_recipe: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    calibration = {"source": str(tiny_text), "samples": 2, "length": 16, "disk_limit_gib": LIMIT}
    found = []
    for stops in ([], ["gradients", "allocate", "compress"]):
        output = tmp_path / str(len(stops))
        stages = STAGES["allocation with compensation"]
        loaded = load_recipe(
            tiny_recipe(model_folder, output, stages=stages, calibration=calibration)
        )
        for stage in stops:
            with pytest.raises(Stopped):
                compress(loaded, Machine("cpu", on_step=StopsAt(stage, 2)))
        compress(loaded, Machine("cpu"))
        found.append(load_file(output / "checkpoint" / "model.safetensors"))
    whole, continued = found
    assert all(whole[key].equal(continued[key]) for key in whole)


def test_a_profile_needs_all_statistics_together(
    model_folder: Path, tiny_recipe: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    calibration = {"source": str(tiny_text), "samples": 2, "length": 16, "disk_limit_gib": LIMIT}
    stages = STAGES["allocation"]
    recipe = tiny_recipe(model_folder, tmp_path / "run", stages=stages, calibration=calibration)
    with pytest.raises(RecipeError, match="disk_limit_gib: --profile needs"):
        profile(load_recipe(recipe), 2, Machine("cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", STAGES)
def test_segments_give_the_same_checkpoint(
    name: str,
    model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    found, most = [], []
    for number, limit in enumerate([None, LIMIT]):
        output, kept = tmp_path / str(number), Kept(tmp_path / str(number))
        calibration = {"source": str(tiny_text), "samples": 2, "length": 16}
        calibration |= {} if limit is None else {"disk_limit_gib": limit}
        stages = STAGES[name]
        recipe = tiny_recipe(model_folder, output, stages=stages, calibration=calibration)
        compress(load_recipe(recipe), Machine("cpu", on_step=kept))
        found.append(load_file(output / "checkpoint" / "model.safetensors"))
        most.append(kept.most)
        assert not (output / "work" / "boundaries").exists()
    whole, parts = found
    assert whole.keys() == parts.keys()
    assert all(whole[key].equal(parts[key]) for key in whole)
    assert most[0] == 5
    assert most[1] < 5
