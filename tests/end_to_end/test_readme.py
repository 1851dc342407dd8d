"""The README: all of its commands are run, in order, as by a user."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml

from lrc.compressors.benchmark.results import SCHEMA as BENCHMARK_SCHEMA
from lrc.compressors.evaluate.gates import check_gate_names
from lrc.compressors.report import SCHEMA
from lrc.configs.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_make_targets_named_in_the_readme_exist() -> None:
    found = re.findall(r"(?m)^make (\w+)|`make (\w+)`", README)
    targets = {name for pair in found for name in pair if name}
    assert {"demo", "test", "model", "check"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_documented_report_keys_are_those_of_the_code() -> None:
    for key, meaning in (*SCHEMA.items(), *BENCHMARK_SCHEMA.items()):
        assert f"| `{key}` | {meaning} |" in README


def test_stages_in_the_readme_are_valid() -> None:
    whole, *parts = blocks("yaml")
    stages = [part for part in parts if part.startswith("stages:")]
    assert stages
    kinds = set[str]()
    for part in stages:
        recipe = {**yaml.safe_load(whole), **yaml.safe_load(part)}
        kinds |= {stage.kind for stage in Recipe.model_validate(recipe).stages}
    assert kinds == {"decompose", "quantize", "heal"}


def test_evaluations_in_the_readme_are_valid() -> None:
    whole, *parts = blocks("yaml")
    found = [part for part in parts if part.startswith("evaluate:")]
    assert found
    for part in found:
        evaluate = Recipe.model_validate({**yaml.safe_load(whole), **yaml.safe_load(part)}).evaluate
        check_gate_names(evaluate.gates, evaluate)


def test_every_recipe_of_the_readme_is_shipped() -> None:
    (named,) = re.findall(r"Recipes: (`.*`)\.", README)
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(re.findall(r"`([\w-]+)`", named)) <= shipped


def write_excerpt(source: Path, path: Path, *, layers: int, tokens: int) -> None:
    """Copy the first layers and tokens of a GGUF model with a byte-level BPE tokenizer."""
    reader = gguf.GGUFReader(source)
    values = {
        name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."
    }
    architecture = values.pop("general.architecture")
    vocabulary = values["tokenizer.ggml.tokens"][:tokens]
    known = set(vocabulary)
    values |= {
        f"{architecture}.block_count": layers,
        f"{architecture}.vocab_size": tokens,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": values["tokenizer.ggml.token_type"][:tokens],
        "tokenizer.ggml.merges": [
            merge for merge in values["tokenizer.ggml.merges"] if merge.replace(" ", "") in known
        ],
    }
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in values.items():
        kind, *of = reader.fields[name].types
        writer.add_key_value(name, value, kind, of[-1] if of else None)
    for tensor in reader.tensors:
        data = tensor.data[:tokens] if tensor.name == "token_embd.weight" else tensor.data
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer is None or int(layer[1]) < layers:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.model
def test_every_command_of_the_walk_runs(
    tmp_path: Path, lrc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a part of the model: neither what the commands print nor its quality is checked here."""
    assert MODEL.is_file(), "run `make model` first"
    models = tmp_path / ".cache" / "models"
    models.mkdir(parents=True)
    write_excerpt(MODEL, models / MODEL.name, layers=3, tokens=4096)
    recipe = blocks("yaml")[0]
    (tmp_path / "my-recipe.yaml").write_text(recipe, encoding="utf-8")
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    monkeypatch.chdir(tmp_path)

    def run(command: list[str]) -> str:
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        return result.stdout

    def run_here(line: str) -> None:
        """Run a command in this process: imports of another one take seconds."""
        name, *arguments = shlex.split(line)
        assert name == "lrc"
        ended = lrc(*arguments)
        assert (ended.code, "Traceback" in ended.err) == (0, False), f"{line}\n{ended.err}"

    first, *commands = [line for block in blocks("bash") for line in block.splitlines()]
    before = commands.index("lrc inspect runs/mine/checkpoint --verify")
    assert len(commands) > before > 0
    run(shlex.split(first))
    for command in commands[:before]:
        run_here(command)
    assert (tmp_path / "runs/mine/report.json").is_file()
    snippet, *_ = blocks("python")  # the others need other checkpoints
    assert "A compiler is" in run([sys.executable, "-c", snippet])
    for command in commands[before:]:
        run_here(command)
