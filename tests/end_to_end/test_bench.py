"""`lrc bench`: models in turn, dense first and last; failures in their cells; clear errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lrc.compressors.benchmark import measure
from lrc.compressors.benchmark.decoders import DECODERS, StaticDecoder
from lrc.compressors.benchmark.grid import Mode

SMALL = ("--prompt", 16, "--tokens", 4, "--repeats", 2, "--batch", 1)


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path_factory: Any
) -> Path:
    """Compressed from the tiny model, which its report names."""
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.pipeline import compress
    from lrc.configs.load import load_recipe

    output = tmp_path_factory.mktemp("bench") / "run"
    stages = [{"decompose": {"method": "svd", "keep": 0.6}}]
    compress(load_recipe(tiny_recipe(tiny_model_folder, output, stages=stages)), Machine("cpu"))
    folder: Path = output / "checkpoint"
    return folder


def results(ended: Any) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_dense_is_the_source_of_the_checkpoint_and_measured_first_and_last(
    lrc, checkpoint: Path, tiny_model_folder: Path
) -> None:
    ended = lrc("bench", checkpoint, *SMALL, "--batch", 2, "--json")
    report = results(ended)
    assert report["against"] == str(tiny_model_folder)
    assert [(each["name"], each["dense"]) for each in report["models"]] == [
        (str(tiny_model_folder), True),
        (str(checkpoint), False),
    ]
    turns = [(str(tiny_model_folder), False), (str(checkpoint), False)]
    turns.append((str(tiny_model_folder), True))
    found = [(each["model"], each["repeated"]) for each in report["results"]]
    assert found == turns * 2
    assert [each["batch"] for each in report["results"]] == [1] * 3 + [2] * 3
    for each in report["results"]:
        assert (each["mode"], each["prompt"], each["tokens"]) == ("eager", 16, 4)
        assert (each["rounds"], each["failed"]) == (2, None)
        for phase in ("prefill", "decode"):
            speed = each[phase]
            assert 0 < speed["p10"] <= speed["median"] <= speed["p90"]
    compared = [each for each in report["results"] if each["model"] == str(checkpoint)]
    for each in compared:
        assert each["decode"]["verdict"] in ("faster", "slower", "equal")
    dense, small = report["models"]
    assert small["weight_bytes"] < dense["weight_bytes"]
    assert all(model["load_seconds"] > 0 for model in report["models"])
    assert report["settings"]["dtype"] == "float32"
    assert [line.partition(":")[0] for line in ended.err.splitlines()] == [
        "load",
        "eager, batch 1, prompt 16, 4 new tokens",
        "eager, batch 2, prompt 16, 4 new tokens",
    ]


def test_a_table_shows_each_point_and_where_a_model_is_slower(
    lrc, checkpoint: Path, tiny_model_folder: Path
) -> None:
    ended = lrc("bench", checkpoint, "--against", tiny_model_folder, *SMALL, "-q")
    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    assert "eager, batch 1, prompt 16, 4 new tokens" in ended.out
    for words in ("(dense)", "dense, repeated", "of dense", "noise:", "load s"):
        assert words in ended.out
    assert ("slower than dense" in ended.out) == ("x slower" in ended.out)


def test_the_dense_model_is_not_measured_a_third_time(lrc, tiny_model_folder: Path) -> None:
    report = results(
        lrc("bench", f"{tiny_model_folder}/", "--against", tiny_model_folder, *SMALL, "--json")
    )
    assert len(report["models"]) == 1
    assert len(report["results"]) == 2


def test_without_a_known_source_there_are_no_ratios(
    lrc, checkpoint: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    ended = lrc("bench", tiny_model_folder, *SMALL)
    assert ended.code == 0
    assert "no ratios: no model names its source in a report" in " ".join(ended.out.split())
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    path = moved / "lrc" / "report.json"
    report = json.loads(path.read_text())
    report["recipe"]["model"]["path"] = "elsewhere/model"
    path.write_text(json.dumps(report))
    found = results(lrc("bench", moved, *SMALL, "--json"))
    assert found["against"] is None
    assert "elsewhere/model, is not on this disk" in found["notes"][0]
    assert len(found["results"]) == 1
    both = results(lrc("bench", moved, checkpoint, *SMALL, "--json"))
    assert "were made from elsewhere/model and" in both["notes"][0]


def test_models_that_do_not_fit_together_are_loaded_in_turn(
    lrc, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "turns_together", lambda *_: False)
    report = results(lrc("bench", checkpoint, *SMALL, "--json"))
    assert report["settings"]["together"] is False
    assert "loaded and measured one after the other" in report["notes"][0]
    assert [each["rounds"] for each in report["results"]] == [2, 2, 2]
    assert report["results"][1]["decode"]["ratio"] is not None


def test_running_out_of_memory_while_loading_falls_back_to_turns(
    lrc, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = measure.load, []

    def load_two(target: Any, **options: Any) -> Any:
        calls.append(target.name)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return load(target, **options)

    monkeypatch.setattr(measure, "load", load_two)
    report = results(lrc("bench", checkpoint, *SMALL, "--json"))
    assert report["settings"]["together"] is False
    assert len(calls) == 2 + 3


def test_in_turn_a_model_that_cannot_be_loaded_is_reported(
    lrc, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "turns_together", lambda *_: False)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    ended = lrc("bench", broken, checkpoint, *SMALL, "--json")
    assert ended.code == 1
    (error,) = ended.errors
    assert f"{broken}: not measured (eager, batch 1, prompt 16): not loaded: " in error
    found = json.loads(ended.out)
    assert [each["failed"] is None for each in found["results"]] == [True, False, True, True]
    assert found["models"][1]["weight_bytes"] is None
    assert found["results"][2]["decode"]["ratio"] > 0
    shown = lrc("bench", broken, checkpoint, *SMALL)
    assert (shown.code, "unknown" in shown.out) == (1, True)


def test_a_mode_that_fails_is_reported_and_the_others_survive(
    lrc, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(StaticDecoder):
        def step(self) -> None:
            if self.model.get_submodule("model.layers.0.mlp.up_proj").__class__.__name__ != (
                "Linear"
            ):
                raise NotImplementedError("no fast\nproduct")
            super().step()

    monkeypatch.setitem(DECODERS, Mode.COMPILE, Fails)
    options = ("--mode", "eager", "--mode", "compile")
    ended = lrc("bench", checkpoint, *SMALL, *options, "--json")
    assert ended.code == 1
    assert ended.errors == [
        f"error[benchmark-incomplete]: {checkpoint}: not measured (compile, batch 1, prompt 16): "
        "NotImplementedError: no fast"
    ]
    found = json.loads(ended.out)["results"]
    assert [each["failed"] is None for each in found] == [True] * 3 + [True, False, True]
    shown = lrc("bench", checkpoint, *SMALL, *options)
    assert shown.code == 1
    assert f"failed: {checkpoint}: NotImplementedError: no fast" in " ".join(shown.out.split())


def test_a_budget_of_seconds_ends_the_rounds_early(lrc, tiny_model_folder: Path) -> None:
    options = ("--repeats", 1000, "--seconds", 0.05)
    (one,) = results(lrc("bench", tiny_model_folder, *SMALL, *options, "--json"))["results"]
    assert 1 <= one["rounds"] < 1000


@pytest.mark.quiet
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_steps_are_compiled_for_a_dense_and_a_compressed_model(lrc, checkpoint: Path) -> None:
    report = results(lrc("bench", checkpoint, *SMALL, "--mode", "compile", "--json"))
    assert [each["mode"] for each in report["results"]] == ["compile"] * 3


def test_a_gguf_file_is_measured(
    lrc, tiny_llama: Callable[..., LlamaForCausalLM], write_gguf: Any, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    (one,) = results(lrc("bench", path, *SMALL, "--dtype", "bfloat16", "--json"))["results"]
    assert one["failed"] is None


MISTAKES: dict[str, tuple[list[object], tuple[str, ...]]] = {
    "unknown mode": (
        ["--mode", "grpah"],
        ("--mode: must be eager, compile or graph, got 'grpah'; did you mean graph?",),
    ),
    "unknown dtype": (["--dtype", "int8"], ("--dtype: must be float32, bfloat16 or float16",)),
    "batch of nothing": (["--batch", 0], ("'--batch': must be a whole number >= 1, got 0",)),
    "prompt of nothing": (["--prompt", 0], ("'--prompt': must be a whole number >= 1",)),
    "no new tokens": (["--tokens", 0], ("'--tokens': must be a whole number >= 1",)),
    "no repeats": (["--repeats", -1], ("'--repeats': must be a whole number >= 1",)),
    "no time": (["--seconds", 0], ("--seconds: must be above 0",)),
    "beyond the context": (["--prompt", 255], ("--prompt: 255 tokens and 64 new ones", "256")),
    "graph on a CPU": (
        ["--mode", "graph", "--device", "cpu"],
        ("--mode: graph must run on a GPU", "use eager or compile"),
    ),
    "unknown device": (["--device", "gpu"], ("--device: must be auto, cpu, cuda or",)),
    "missing dense model": (["--against", "nowhere/at/all"], ("no file or folder 'nowhere/at",)),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_error_each(lrc, tiny_model_folder: Path, case: str) -> None:
    options, words = MISTAKES[case]
    lrc("bench", tiny_model_folder, *options).refuses(2, *words)


def test_missing_and_damaged_models_are_refused_before_anything_is_measured(
    lrc, checkpoint: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    lrc("bench").refuses(2, "missing argument", "`lrc bench --help`")
    lrc("bench", tmp_path / "no").refuses(2, f"no file or folder '{tmp_path / 'no'}'")
    lrc("bench", tmp_path, *SMALL).refuses(1, "no checkpoint here (no config.json)")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    lrc("bench", checkpoint, broken, *SMALL).refuses(1, "broken", "copy or download")


def test_another_vocabulary_cannot_be_compared(
    lrc, tiny_llama: Callable[..., LlamaForCausalLM], tiny_model_folder: Path, tmp_path: Path
) -> None:
    tiny_llama(vocab_size=520).save_pretrained(tmp_path / "other")
    lrc("bench", tmp_path / "other", "--against", tiny_model_folder, *SMALL).refuses(
        2, "other: has a vocabulary of 520 tokens", "has 512", "the same vocabulary"
    )
