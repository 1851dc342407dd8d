"""The README: all of its commands are run, in order, as by a user; and those of other pages."""

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

ROOT = Path(__file__).parents[2]
CONTINUED = ("docs/exporting.md", "docs/reports.md", "docs/loading.md")
"""Pages whose commands and snippets use the checkpoint of the README."""
MODEL = ROOT / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


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
    write_excerpt(MODEL, models / MODEL.name, layers=1, tokens=2048)
    recipe = blocks("yaml")[0]
    for many, few in (
        ("samples: 16, length: 512", "samples: 4, length: 128"),
        ("windows: 4", "windows: 1"),
    ):
        assert many in recipe
        recipe = recipe.replace(many, few)
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

    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert "lrc compress my-recipe.yaml" in commands
    for page in CONTINUED:
        added = [line for block in blocks("bash", page) for line in block.splitlines()]
        commands += [line for line in added if line not in commands]
    for command in commands:
        if command == "lrc recipes list":  # the command itself, once: this one imports little
            run(shlex.split(command))
        else:
            run_here(command)
    assert (tmp_path / "runs/mine/report.json").is_file()
    first, *_ = blocks("python")
    snippets = [snippet for page in CONTINUED for snippet in blocks("python", page)]
    printed = run([sys.executable, "-c", "\n".join([*snippets, first])])
    assert "A compiler is" in printed
    assert "largest error: model.layers." in printed
