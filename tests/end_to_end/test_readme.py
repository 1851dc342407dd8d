"""What the README promises: every command in it is run, in its order, as a user would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


def test_the_documented_report_keys_are_the_code_s() -> None:
    for key, meaning in SCHEMA.items():
        assert f"| `{key}` | {meaning} |" in README


def test_stages_in_the_readme_are_a_recipe_s() -> None:
    whole, *parts = blocks("yaml")
    stages = [part for part in parts if part.startswith("stages:")]
    assert stages
    for part in stages:
        recipe = {**yaml.safe_load(whole), **yaml.safe_load(part)}
        assert Recipe.model_validate(recipe).quantizations


def test_every_recipe_of_the_readme_is_shipped() -> None:
    (named,) = re.findall(r"Recipes: (`.*`)\.", README)
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(re.findall(r"`([\w-]+)`", named)) <= shipped


@pytest.mark.model
def test_every_command_of_the_walk_runs(tmp_path: Path) -> None:
    assert MODEL.is_file(), "run `make model` first"
    link = tmp_path / ".cache" / "models"
    link.mkdir(parents=True)
    (link / MODEL.name).symlink_to(MODEL)
    recipe = blocks("yaml")[0]
    (tmp_path / "my-recipe.yaml").write_text(recipe, encoding="utf-8")
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}

    def run(command: list[str]) -> str:
        result = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        return result.stdout

    commands = [line for block in blocks("bash") for line in block.splitlines()]
    before = commands.index("lrc inspect runs/mine/checkpoint --verify")
    assert len(commands) > before > 0
    for command in commands[:before]:
        run(shlex.split(command))
    assert (tmp_path / "runs/mine/report.json").is_file()
    (snippet,) = blocks("python")
    assert "A compiler is" in run([sys.executable, "-c", snippet])
    for command in commands[before:]:
        run(shlex.split(command))
