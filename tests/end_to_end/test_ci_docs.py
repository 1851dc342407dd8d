"""docs/ci.md: its recipe is valid and all of its commands are run, in order."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCUMENT = Path(__file__).parents[2] / "docs/ci.md"


def blocks(language: str) -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def folder(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Return the folder of the pipeline, with the model and the recipe of the document."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    (tmp_path / "runs").mkdir()
    evaluate = yaml.safe_load(blocks("yaml")[0])["evaluate"]
    evaluate["perplexity"][0]["window"] = 64  # the model's context is short
    evaluate["baselines"] = []
    # Close to the dense model: predictions of a random one change with everything.
    stage = {"method": "mixed", "keep": 0.5, "components": ["dense"], "schemes": ["int8", "int6"]}
    recipe = tiny_recipe(
        Path("model"), tmp_path / "ci", evaluate=evaluate, stages=[{"decompose": stage}]
    )
    text = recipe.read_text().replace(str(tmp_path / "ci"), "runs/ci")
    (tmp_path / "ci.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_every_command_of_the_pipeline_runs(lrc: Callable[..., Any], folder: Path) -> None:
    for line in "".join(blocks("bash")).replace("$MODEL", "model").splitlines():
        words = shlex.split(re.sub(r"--window \d+", "--window 64", line))
        if words[0] != "lrc":
            printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            assert printed.strip()
            continue
        to = words.index(">") if ">" in words else len(words)
        ended = lrc(*words[1:to])
        assert ended.code == 0, f"{line}\n{ended.err}"
        if to < len(words):
            Path(words[to + 1]).write_text(ended.out, encoding="utf-8")
    assert {"compress.xml", "eval.xml", "bench.xml"} <= {path.name for path in folder.iterdir()}
    (found,) = json.loads(Path("search.json").read_text())["target"]["found"]
    assert 0 < found["keep"] < 1
    if shutil.which("jq") is None:
        pytest.skip("all commands of the pipeline ran; jq is not installed, so its lines were not")
    for line in "".join(blocks("jq")).splitlines():
        subprocess.run(shlex.split(line), check=True, capture_output=True)


def test_the_gates_of_the_document_are_valid() -> None:
    from lrc.cli.gate_results import read_gates

    table = re.findall(r"^\| (`.*?`) \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [text for cell in table for text in re.findall(r"`(.*?)`", cell)]
    assert len(read_gates(texts)) == len(texts) > 6


def test_the_job_of_github_is_yaml() -> None:
    job = yaml.safe_load(blocks("yaml")[1])["jobs"]["compress"]
    assert any(step.get("run", "").startswith("lrc compress") for step in job["steps"])


@pytest.mark.parametrize(
    ("code", "printed", "ended"),
    [(0, "good enough", 0), (4, "not good enough", 1), (1, "not measured", 2)],
)
def test_the_script_distinguishes_the_exit_codes(
    code: int, printed: str, ended: int, tmp_path: Path
) -> None:
    (script,) = blocks("sh")
    command = tmp_path / "lrc"  # ends as `lrc eval` does
    command.write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MODEL": "model"}
    result = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == (printed, ended)
