"""The benchmark on real shapes, run on a tiny model so that it keeps working."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "shapes.py"
QUICK = ["--method", "svd-llm", "--samples", "4", "--length", "32", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shapes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_random_model_is_timed_and_its_files_are_deleted(shapes, tmp_path, capsys):
    override = "stages.0.decompose.overrides=[{match: '*.0.*', keep: 0.5}]"
    shapes.main(["--preset", "tiny", "--folder", str(tmp_path), "--set", override, *QUICK])
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["matrices"] == {"64 x 64": 4, "32 x 64": 4, "96 x 64": 4, "64 x 96": 2}
    assert facts["model"]["parameters"]["dense"] == 2 * 512 * 64 + 5 * 64 + 2 * 64 * (3 * 64 + 288)
    assert facts["kept"] <= 0.8  # the total that `keep` gives, overrides included
    seconds = facts["seconds"]
    assert {"calibrate", "compress", "save"} <= seconds["stages"].keys()
    assert sum(seconds["stages"].values()) <= seconds["compress"] + 0.05
    assert (facts["device"], facts["peak_gpu_bytes"], facts["folder"]) == ("cpu", None, None)
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


def test_hidden_states_neither_vanish_nor_explode(shapes, tmp_path):
    for tied in (False, True):
        sizes = dict(zip(shapes.SIZES, shapes.PRESETS["tiny"], strict=True))
        sizes |= {"num_hidden_layers": 16, "tie_word_embeddings": tied}
        shapes.make_model(tmp_path / str(tied), sizes, "cpu")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied), dtype=torch.float32)
        tokens = torch.arange(256).view(2, 128)
        with torch.no_grad():
            out = model(tokens, output_hidden_states=True)
        sizes_of_states = [float(h.square().mean().sqrt()) for h in out.hidden_states]
        assert min(sizes_of_states) > 0.05
        assert max(sizes_of_states) < 3
        assert 0.3 < float(out.logits.std()) < 3


def test_singular_values_of_random_matrices_fall_as_a_power(shapes):
    W = shapes.random_matrix(300, 200, torch.Generator().manual_seed(0))
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
