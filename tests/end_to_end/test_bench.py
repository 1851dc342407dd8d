"""`lrc bench`: models in turn, dense first and last; failures in their cells; clear errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lrc.compressors.benchmark import fast_paths, measure
from lrc.compressors.benchmark.decoders import DECODERS, StaticDecoder
from lrc.compressors.benchmark.grid import Mode
from lrc.compressors.layers import packed_weight

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
def test_steps_are_compiled_for_a_dense_and_a_compressed_model(
    lrc: Any,
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """With one layer: a C++ compiler takes seconds for every kernel."""
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    stages = [{"decompose": {"method": "svd", "keep": 0.6}}]
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "run", stages=stages)
    assert lrc("compress", recipe, "-q").code == 0
    checkpoint = tmp_path / "run/checkpoint"
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


@pytest.fixture(scope="module")
def integers(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path_factory: Any
) -> Path:
    """Return the output folder of a run with integers; the embedding is among them."""
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.pipeline import compress
    from lrc.configs.load import load_recipe

    output: Path = tmp_path_factory.mktemp("integers") / "run"
    quantize = {"method": "rtn", "bits": 4, "group_size": 16, "embeddings": "int8"}
    recipe = tiny_recipe(tiny_model_folder, output, stages=[{"quantize": quantize}])
    compress(load_recipe(recipe), Machine("cpu"))
    return output


@pytest.fixture
def run_folder(integers: Path, tmp_path: Path) -> Path:
    """Return a copy that may be changed."""
    return Path(shutil.copytree(integers, tmp_path / "run"))


@pytest.fixture
def four_bits_are_slow(monkeypatch: pytest.MonkeyPatch) -> str:
    """Have no fast path for int4, and return the reason."""
    reason = "Triton [x]: Triton is not installed; `pip install triton`"
    select = packed_weight.select
    monkeypatch.setattr(
        packed_weight, "select", lambda need: reason if need.codec == 4 else select(need)
    )
    return reason


def test_forms_without_a_fast_path_are_named_by_bench_and_inspect(
    lrc, integers: Path, four_bits_are_slow: str
) -> None:
    checkpoint = integers / "checkpoint"
    dense, model = results(lrc("bench", checkpoint, *SMALL, "--json"))["models"]
    (form,) = model["slow_forms"]
    layers = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]
    assert dense["slow_forms"] == []
    assert form == {
        "form": "dense int4-g16",
        "layers": len(layers) - 1,
        "example": "model.layers.0.mlp.down_proj",
        "reason": four_bits_are_slow,
    }
    inspected = results(lrc("inspect", checkpoint, "--json", "--device", "cpu"))
    assert inspected["fast_paths"]["device"] == "cpu"
    assert inspected["fast_paths"]["dtype"] == "bfloat16"
    assert inspected["fast_paths"]["slow_forms"] == [form]
    for command in (("bench", checkpoint, *SMALL, "-q"), ("inspect", checkpoint)):
        shown = " ".join(lrc(*command).out.split())
        assert "no fast path" in shown
        assert f"dense int4-g16 ({form['layers']} layers, such as {form['example']})" in shown
        assert four_bits_are_slow in shown


def test_inspect_loads_one_layer_of_each_configuration(
    lrc, integers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], fast_paths._load_layer

    def load_one(name: str, config: Any, *rest: Any) -> Any:
        loaded.append((config.shape, config.types, str(config.quantization)))
        return load(name, config, *rest)

    monkeypatch.setattr(fast_paths, "_load_layer", load_one)
    found = results(lrc("inspect", integers / "checkpoint", "--json"))
    assert len(loaded) == len(set(loaded)) < len(found["modules"])
    multiplied = [m for m in found["modules"] if "embed" not in m["name"]]
    assert {(tuple(m["shape"]), m["types"], m["quantization"]) for m in multiplied} == {*loaded}


def test_an_embedding_that_is_only_looked_up_needs_no_fast_path(
    lrc, tiny_llama: Any, tiny_tokenizer: Any, tiny_recipe: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, output = tmp_path / "source", tmp_path / "run"
    tiny_llama(tie_word_embeddings=False).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    quantize = {"method": "rtn", "bits": 4, "embeddings": "int8", "lm_head": "int6"}
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.pipeline import compress
    from lrc.configs.load import load_recipe

    compress(load_recipe(tiny_recipe(source, output, stages=[{"quantize": quantize}])), Machine())
    monkeypatch.setattr(packed_weight, "select", lambda _: "none")
    found = results(lrc("inspect", output / "checkpoint", "--json"))["fast_paths"]["slow_forms"]
    assert {form["form"] for form in found} == {"dense int4", "dense int6"}
    (model,) = results(lrc("bench", output / "checkpoint", "--against", output / "checkpoint",
                           *SMALL, "--json"))["models"]  # fmt: skip
    assert model["slow_forms"] == found


def test_inspect_names_a_device_that_is_not_there(lrc, integers: Path) -> None:
    lrc("inspect", integers / "checkpoint", "--device", "gpu").refuses(
        2, "--device", "must be auto, cpu, cuda or cuda:N", code="unknown-device"
    )


def test_results_are_added_to_report_and_card(
    lrc, run_folder: Path, tiny_recipe: Callable[..., Path]
) -> None:
    checkpoint = run_folder / "checkpoint"
    card = run_folder / "README.md"
    card.write_text(card.read_text() + "\nEdited by hand.\n")
    before = card.read_text()
    for batch in (1, 2):  # the second run replaces the first
        ended = lrc("bench", checkpoint, *SMALL[:-1], batch, "--report", "--json")
        found = results(ended)
        report = json.loads((run_folder / "report.json").read_text())
        assert report["speed"] == found
        assert f"eager, batch {batch}, prompt 16" in (run_folder / "report.html").read_text()
        same = (checkpoint / "lrc" / "report.json").read_text()
        assert same == (run_folder / "report.json").read_text()
        for path in (card, checkpoint / "README.md"):
            text = path.read_text()
            assert text.count("## Speed") == 1
            assert f"| eager | {batch} | 16 | 4 | this model |" in text
            assert ("Slower than dense in" in text) != ("In no measurement slower" in text)
            assert text.index("## Speed") < text.index("## Load it")
    text = card.read_text()
    start, end = text.index("<!-- lrc bench -->"), text.index("<!-- end of lrc bench -->")
    assert (text[:start] + text[end + 25 :]).split() == before.split()
    assert lrc("inspect", checkpoint, "--verify").code == 0
    assert results(lrc("inspect", checkpoint, "--json"))["speed"] == found
    assert lrc("bench", checkpoint, *SMALL).code == 0  # leaves the report alone
    assert json.loads((run_folder / "report.json").read_text()) == report


def test_a_damaged_report_is_refused_before_anything_is_measured(
    lrc, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_folder / "checkpoint" / "lrc" / "report.json"
    report = json.loads(path.read_text())
    report["speed"] = {"results": []}  # added by hand
    path.write_text(json.dumps(report))
    monkeypatch.setattr(measure, "load", None)
    for command in (("bench", path.parents[1], *SMALL, "--report"), ("inspect", path.parents[1])):
        lrc(*command).refuses(1, "report.json", "has changed", code="changed-file")
    path.write_text("{")
    lrc("bench", path.parents[1], *SMALL, "--report").refuses(
        1, "report.json", "not a readable JSON file", code="invalid-checkpoint"
    )


def test_a_report_of_another_run_next_to_a_checkpoint_is_left_alone(lrc, run_folder: Path) -> None:
    other = run_folder / "report.json"
    other.write_text("{}")
    card = (run_folder / "README.md").read_text()
    assert lrc("bench", run_folder / "checkpoint", *SMALL, "--report").code == 0
    assert other.read_text() == "{}"
    assert (run_folder / "README.md").read_text() == card
    assert "speed" in (run_folder / "checkpoint" / "lrc" / "report.json").read_text()


def test_without_a_report_to_add_to_the_option_is_refused(
    lrc, integers: Path, tiny_model_folder: Path
) -> None:
    for models in ((tiny_model_folder,), (integers / "checkpoint", "--against",
                                          integers / "checkpoint")):  # fmt: skip
        lrc("bench", *models, *SMALL, "--report").refuses(2, "--report", "no model has one")
