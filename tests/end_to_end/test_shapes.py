"""The benchmark on real shapes, run on a tiny model so that it keeps working."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrc.compressors.models.architecture import build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.configs.recipe import Model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "shapes.py"
QUICK = ["--method", "svd-llm", "--samples", "4", "--length", "32", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def shapes() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("shapes")


def test_a_random_model_is_timed_and_its_files_are_deleted(shapes, tmp_path, capsys):
    override = "stages.0.decompose.overrides=[{match: '*.0.*', keep: 0.5}]"
    shapes.main(["--preset", "tiny", "--folder", str(tmp_path), "--set", override, *QUICK])
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["matrices"] == {"64 x 64": 4, "32 x 64": 4, "96 x 64": 4, "64 x 96": 2}
    assert facts["model"]["parameters"]["dense"] == 2 * 512 * 64 + 5 * 64 + 2 * 64 * (3 * 64 + 288)
    assert facts["kept"] <= 0.8  # the total that `keep` gives, overrides included
    stages = facts["stages"]
    assert {"calibrate", "compress", "save", "other"} <= stages.keys()
    total = sum(stage["seconds"] for stage in stages.values())
    assert total == pytest.approx(facts["seconds"]["run"], abs=0.05)
    assert all(0.05 < stage["host_gib"] < 64 for stage in stages.values())
    assert (facts["device"], stages["compress"]["gpu_gib"], facts["folder"]) == ("cpu", 0, None)
    assert "extrapolation" not in facts
    assert list(tmp_path.iterdir()) == []


def test_a_given_model_is_timed_on_text_of_its_tokens(shapes, tiny_model_folder, tmp_path, capsys):
    arguments = ["--model", str(tiny_model_folder), "--folder", str(tmp_path), "--keep-files"]
    shapes.main([*arguments, *QUICK])
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["name"] == str(tiny_model_folder)
    folder = Path(facts["folder"])
    assert folder.parent == tmp_path
    assert (folder / "run" / "checkpoint" / "config.json").is_file()
    assert not (folder / "model").exists()
    text = (folder / "text.txt").read_text(encoding="utf-8")
    assert len(text.split()) >= 4 * 32
    assert text.isprintable()  # a byte-level vocabulary has control characters, which no text has


@pytest.fixture
def tiny(shapes):
    """Make a random model of some layers, the first and the last of `depth`."""

    def make(n_layers: int, depth: int, *, tied: bool = False) -> Any:
        sizes = dict(zip(shapes.SIZES, shapes.PRESETS["tiny"], strict=True))
        sizes |= {"num_hidden_layers": n_layers, "tie_word_embeddings": tied}
        return shapes.RandomModel.llama(sizes, "cpu", depth)

    return make


def test_generated_weights_are_those_of_the_files(tiny, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "generated").mkdir()
    model = tiny(3, 80)
    model.save(tmp_path / "saved")
    read = WeightReader.read
    with model.generated(tmp_path / "generated"):
        readers = [
            WeightReader(folder, build(locate(Model(path=str(folder)))))
            for folder in (tmp_path / "generated", tmp_path / "saved")
        ]
        names = [*model.meta]
        assert all(torch.equal(*(each.read(name) for each in readers)) for name in names)
    assert WeightReader.read is read
    file = tmp_path / "generated/model.safetensors"
    assert file.stat().st_size > 2 * sum(tensor.numel() for tensor in model.meta.values())
    assert file.stat().st_blocks * 512 < file.stat().st_size / 4  # its values are nowhere


def test_few_layers_are_the_first_and_the_last_of_all(tiny):
    few, all_layers = tiny(3, 8), tiny(8, 8)
    for layer, same in enumerate((0, 6, 7)):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(few.read(name.format(layer)), all_layers.read(name.format(same)))


def test_costs_of_all_layers_are_extrapolated_from_those_of_some(shapes, tmp_path, capsys):
    few = ["--preset", "tiny", "--generated", "--layers", "3", "--depth", "30", "--evaluate", "1"]
    shapes.main([*few, "--folder", str(tmp_path), *QUICK])
    facts = json.loads(capsys.readouterr().out)
    assert facts["perplexity"]["text"]["compressed"] > 0
    assert [each["name"] for each in facts["baselines"]] == ["int8", "int4-g64"]
    found = facts["extrapolation"]
    assert (found["extrapolated_to_layers"], "extrapolated from 3" in found["note"]) == (30, True)
    stages = facts["stages"]
    assert found["seconds"].keys() == stages.keys()
    for stage in ("calibrate", "compress", "save", "evaluate"):
        assert found["seconds"][stage] >= round(stages[stage]["seconds"], 1)


def test_exponents_are_those_of_powers(shapes):
    costs = {n: {"square": 3 * n**2, "constant": 5, "absent": 0} for n in (10, 100, 1000)}
    assert shapes.exponents(costs) == {"square": 2, "constant": 0}


def test_hidden_states_neither_vanish_nor_explode(tiny, tmp_path):
    for tied in (False, True):
        (tmp_path / str(tied)).mkdir()
        tiny(16, 16, tied=tied).save(tmp_path / str(tied))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied), dtype=torch.float32)
        tokens = torch.arange(256).view(2, 128)
        with torch.no_grad():
            out = model(tokens, output_hidden_states=True)
        sizes_of_states = [float(h.square().mean().sqrt()) for h in out.hidden_states]
        assert min(sizes_of_states) > 0.05
        assert max(sizes_of_states) < 3
        assert 0.3 < float(out.logits.std()) < 3


@pytest.mark.usefixtures("shapes")
def test_singular_values_of_random_matrices_fall_as_a_power():
    random_matrix = importlib.import_module("shape_models").random_matrix
    W = random_matrix(300, 200, torch.Generator().manual_seed(0))
    assert float(W.square().mean()) == pytest.approx(1, rel=0.1)
    values = torch.linalg.svdvals(W)
    assert 5 < float(values[0] / values[100]) < 20  # 100 ** DECAY is 10
    assert values[-1] > 0


def test_layers_of_experts_are_timed_and_extrapolated(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    experts = importlib.import_module("experts")
    arguments = ["--preset", "tiny", "--folder", str(tmp_path), "--device", "cpu"]
    sizes = ["--layers", "3", "--samples", "8", "--length", "64"]
    experts.main([*arguments, *sizes, "--methods", "reap", "--products"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["experts"]["layers"] == 3
    seconds, layer = facts["seconds"], facts["seconds"]["layer"]
    assert [*layer] == ["slice"]
    assert seconds["layer_total"] == layer["slice"]
    assert seconds["extrapolated"] + 1 >= seconds["total"] - seconds["stages"]["save"]
    outside = 2 * 2 * 512 * 128
    stored, whole = facts["bytes"]["measured"], facts["bytes"]["extrapolated"]
    assert whole - outside == pytest.approx((stored - outside) * 48 / 3, abs=1)
    assert {*facts["milliseconds"]} == {"together", "one after the other", "difference"}
    assert not any(facts["milliseconds"]["difference"].values())  # the same code on a CPU
    assert list(tmp_path.iterdir()) == []
