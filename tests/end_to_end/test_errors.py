"""Bad input gets one clear error, the right exit code, no traceback, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lrc.cli import console
from lrc.cli.main import main
from lrc.compressors.journal import open_journal


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refuses(self, code: int, *words: str) -> None:
        """Demand this exit code, nothing on stdout, no traceback, and one error with the words."""
        assert (self.code, self.out) == (code, ""), self.err
        assert "Traceback" not in self.err
        assert "fault of lrc" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        for word in words:
            assert word in errors[0]


@pytest.fixture
def lrc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run the real command line in this process."""
    monkeypatch.setattr(console, "hush", lambda: None)  # it sets variables for the whole process

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["lrc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def folder(
    tmp_path: Path, tiny_llama: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> Path:
    """Return a folder with a model and a recipe that works."""
    tiny_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "model": str(folder / "model"),
        "calibration": {"source": "python-docs", "samples": 4, "length": 32},
        "stages": [{"decompose": {"method": "svd-llm", "keep": 0.7}}],
        "evaluate": {"perplexity": [{"source": "python-docs", "window": 32, "windows": 2}]},
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return path


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


OVERRIDES = {
    "misspelt key": ("stages.0.decompose.kep=0.5", "did you mean 'keep'?"),
    "wrong type": ("calibration.samples=many", "calibration.samples: must be a whole number"),
    "keep too large": ("stages.0.decompose.keep=1.2", "keep: must be in (0, 1], got 1.2"),
    "keep zero": ("stages.0.decompose.keep=0", "keep: must be in (0, 1], got 0"),
    "unknown method": ("stages.0.decompose.method=svdllm", "did you mean 'svd-llm'?"),
    "no such model": ("model=nowhere/at/all", "no file or folder 'nowhere/at/all'"),
    "no such text": ("calibration.source=nowhere.jsonl", "nowhere.jsonl"),
    "pattern of nothing": ("stages.0.decompose.skip=['*.q_porj']", "did you mean '*.q_proj'?"),
    "beyond the context": ("calibration.length=257", "calibration.length: must be at most 256"),
    "unknown gate": ("evaluate.gates=[{metric: perplexity.docs, at_most: 1}]", "perplexity.docs"),
    "no key and value": ("keep", "key.path=value"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_wrong_recipes_exit_with_2_before_anything_is_written(
    lrc: Callable[..., Ended], folder: Path, case: str
) -> None:
    override, words = OVERRIDES[case]
    lrc("compress", folder / "recipe.yaml", override).refuses(2, words)
    assert not (folder / "out").exists()


def test_recipes_that_are_none(lrc: Callable[..., Ended], folder: Path) -> None:
    lrc("compress", folder / "no.yaml").refuses(2, "no.yaml")
    lrc("compress", folder).refuses(2, str(folder))
    for content, word in (
        (b"", "empty"),
        (b"\xff\x00\x01", "UTF-8"),
        (b"a: [1", ":1:6: not valid YAML"),
    ):
        (folder / "bad.yaml").write_bytes(content)
        lrc("plan", folder / "bad.yaml").refuses(2, "bad.yaml", word)


def _pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ("no config.json",)),
    "config that is not JSON": (lambda m: (m / "config.json").write_text("{"), ("config.json",)),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("no weights (*.safetensors)",)),
    "pickled": (_pickle, ("pytorch_model.bin", "never read", "save_pretrained")),
    "truncated": (lambda m: cut(m / "model.safetensors"), ("not a whole safetensors file",)),
    "no tokenizer": (
        lambda m: [f.unlink() for f in m.glob("token*")],
        ("no tokenizer", "model.tokenizer"),
    ),
    "missing tensor": (
        lambda m: change_weights(m, lambda t: t.pop("model.norm.weight")),
        ("model.norm.weight is missing",),
    ),
    "nan": (
        lambda m: change_weights(
            m, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))
        ),
        ("model.layers.1.mlp.up_proj.weight holds NaN or Inf",),
    ),
    "overflow": (
        lambda m: change_weights(m, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(3e38)),
        ("model.layers.0", "not finite on the calibration text"),
    ),
    "quantized": (
        lambda m: change_config(m, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("already compressed", "gptq", "original"),
    ),
    "remote code": (
        lambda m: change_config(m, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        ("trust_remote_code: true",),
    ),
    "unknown type": (lambda m: change_config(m, model_type="nobody_knows"), ("nobody_knows",)),
    "Conv1D": (
        lambda m: change_config(m, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        ("GPT2LMHeadModel", "Conv1D", "supported are", "Llama"),
    ),
    "fused experts": (
        lambda m: change_config(m, model_type="mixtral", architectures=["MixtralForCausalLM"]),
        ("MixtralForCausalLM", "fused experts", "supported are"),
    ),
    "encoder-decoder": (
        lambda m: change_config(m, model_type="t5", is_encoder_decoder=True),
        ("encoder-decoder", "supported are"),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_unusable_models_exit_with_1_and_leave_no_checkpoint(
    lrc: Callable[..., Ended], folder: Path, case: str
) -> None:
    spoil, words = MODELS[case]
    spoil(folder / "model")
    lrc("compress", folder / "recipe.yaml", "-q").refuses(1, *words)
    assert not (folder / "out" / "checkpoint").exists()
    assert not list((folder).glob("out/.*partial*"))


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "empty"),
    "binary.txt": (b"\x00\x01\xff", "binary"),
    "short.txt": (b"a few words", "calibration text holds"),
    "bad.jsonl": (b'{"text": "a"}\n{"text"\n', "line 2"),
    "other.jsonl": (b'{"body": "a"}\n', "'text'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_unusable_texts_exit_with_1(lrc: Callable[..., Ended], folder: Path, name: str) -> None:
    content, word = TEXTS[name]
    (folder / name).write_bytes(content)
    override = f"calibration.source={folder / name}"
    lrc("compress", folder / "recipe.yaml", override, "-q").refuses(1, word)
    assert not (folder / "out" / "checkpoint").exists()


def test_output_folders_that_are_taken(lrc: Callable[..., Ended], folder: Path) -> None:
    recipe, output = folder / "recipe.yaml", folder / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    lrc("compress", recipe, "--overwrite").refuses(1, "not empty", "choose another")
    assert [p.name for p in output.iterdir()] == ["thesis.tex"]
    shutil.rmtree(output)
    output.write_text("a file")
    lrc("compress", recipe).refuses(1, "is a file")
    assert output.read_text() == "a file"
    output.unlink()
    for place in ("/proc/lrc-out", folder / "recipe.yaml" / "out"):
        lrc("compress", recipe, f"output={place}").refuses(1, "cannot be written", "choose another")
    with open_journal(output, {}):
        lrc("compress", recipe).refuses(1, "in use by another lrc compress")


def test_a_finished_run_is_not_run_again_and_another_one_does_not_replace_it(
    lrc: Callable[..., Ended], folder: Path
) -> None:
    recipe, output = folder / "recipe.yaml", folder / "out"
    first = lrc("compress", recipe, "--json", "-q")
    assert (first.code, first.err) == (0, "")
    report = json.loads(first.out)
    assert report == json.loads((output / "report.json").read_text())
    weights = output / "checkpoint" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = json.loads(lrc("compress", recipe, "--json", "-q").out)
    assert again["evaluation"] == report["evaluation"]
    changed = lrc("compress", recipe, "evaluate.perplexity.0.windows=1", "--json", "-q")
    entry = json.loads(changed.out)["evaluation"]["perplexity"]["python-docs"]
    assert entry["windows"] == 1
    assert weights.stat().st_mtime_ns == written
    lrc("compress", recipe, "seed=1").refuses(1, "differs in seed", "--overwrite")
    assert weights.stat().st_mtime_ns == written
    (output / "notes.txt").write_text("mine")
    assert lrc("compress", recipe, "seed=1", "--overwrite", "-q").code == 0
    assert weights.stat().st_mtime_ns != written
    assert (output / "notes.txt").read_text() == "mine"


def test_a_missed_gate_exits_with_4_after_everything_is_written(
    lrc: Callable[..., Ended], folder: Path
) -> None:
    gate = "evaluate.gates=[{metric: perplexity.python-docs, at_most: 1.5}]"
    ended = lrc("compress", folder / "recipe.yaml", gate, "-q")
    assert ended.code == 4
    assert "perplexity.python-docs" in ended.err
    assert (folder / "out" / "report.json").exists()
    assert (folder / "out" / "checkpoint" / "config.json").exists()


def _set_rank(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    name = next(iter(config["quantization_config"]["modules"]))
    config["quantization_config"]["modules"][name]["rank"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))


def _set_version(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (checkpoint / "config.json").write_text(json.dumps(config))


def _rename_tensor(checkpoint: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(".a.weight"))
        tensors["other"] = tensors.pop(name)

    change_weights(checkpoint, rename)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda c: cut(c / "model.safetensors"), ("not a whole safetensors file",)),
    "rank edited": (_set_rank, ("do not fit config.json",)),
    "tensor renamed": (_rename_tensor, ("do not fit config.json",)),
    "newer": (_set_version, ("format_version", "99", "upgrade lrc")),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), ("no weights",)),
    "no config": (lambda c: (c / "config.json").unlink(), ("OUTPUT/checkpoint",)),
}


def test_damaged_checkpoints_exit_with_1(lrc: Callable[..., Ended], folder: Path) -> None:
    assert lrc("compress", folder / "recipe.yaml", "-q", "evaluate.perplexity=[]").code == 0
    sound = folder / "out" / "checkpoint"
    assert lrc("inspect", sound, "--verify").code == 0
    for case, (spoil, words) in CHECKPOINTS.items():
        copy = folder / case.replace(" ", "-")
        shutil.copytree(sound, copy)
        spoil(copy)
        lrc("inspect", copy).refuses(1, *words)
        lrc(
            "eval", copy, "--perplexity", "python-docs", "--window", 32, "--windows", 1, "-q"
        ).refuses(1, *words)
    weights = sound / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    lrc("inspect", sound, "--verify").refuses(1, "model.safetensors has changed")


def test_wrong_command_lines_exit_with_2(lrc: Callable[..., Ended], folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    lrc("compress", recipe, "--device", "gpu").refuses(2, "--device: must be auto, cpu, cuda")
    lrc("compress", recipe, "--device", "cuda:7").refuses(2, "torch sees")
    lrc("eval", folder / "model").refuses(2, "nothing to measure")
    lrc("eval", folder / "model", "--perplexity", "python-docs", "--window", 0).refuses(
        2, "--window"
    )
    lrc("eval", folder / "model", "--tasks", "no_such", "--include-path", folder).refuses(
        2, "no_such"
    )
    lrc("recipes", "show", "dmo").refuses(2, "demo")
    lrc("inspect", folder / "model").refuses(1, "not one that lrc compressed")
    for arguments in (["compress"], ["frobnicate"], ["plan", recipe, "--frobnicate"]):
        ended = lrc(*arguments)
        assert ended.code == 2
        assert "Traceback" not in ended.err
