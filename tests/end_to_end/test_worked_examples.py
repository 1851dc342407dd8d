"""The worked examples of the developers' page: applied to a copy of the source, and used."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/development.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`([\w/.]+\.py)`:\n\n```(python|diff)\n(.*?)```", re.DOTALL | re.MULTILINE)
USE = """
import sys

from lrc.cli.main import main
from lrc.compressors import pipeline

pipeline.write_page = lambda *arguments: True  # drawing takes longer than the runs
for recipe in sys.argv[1:]:
    sys.argv = ["lrc", "compress", recipe]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (recipe, ended.code)
"""


def sections() -> dict[str, str]:
    """Return the text of every example by its heading."""
    found = re.findall(r"^## (Add [^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return dict(found)


def applied(text: str, change: str) -> str:
    """Apply the hunks of a change, whose places the unchanged and removed lines give."""
    for hunk in re.split(r"^@@\n", change, flags=re.MULTILINE):
        lines = [line or " " for line in hunk.splitlines()]
        assert {line[0] for line in lines} <= {" ", "+", "-"}
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
        assert text.count(old) == 1, f"not once in the source:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package with all examples."""
    folder = tmp_path_factory.mktemp("source")
    for part in ("cli", "compressors", "configs", "recipes"):
        shutil.copytree(ROOT / part, folder / ".package/lrc" / part)
    for path in (ROOT / ".package/lrc").glob("*.py"):
        shutil.copy(path, folder / ".package/lrc")
    changes = [change for text in sections().values() for change in FILE.findall(text)]
    assert len(changes) == 10
    for name, language, content in changes:
        path = folder / ".package/lrc" / name
        if language == "python":
            assert not path.exists()
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(applied(path.read_text(encoding="utf-8"), content), encoding="utf-8")
    return folder


def test_methods_components_and_stages_are_added_as_documented(
    source: Path, tmp_path: Path, tiny_model_folder: Path, tiny_recipe: Callable[..., Path]
) -> None:
    recipes = []
    for title, text in sections().items():
        (stages,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
        output = tmp_path / title.rpartition(" ")[2]
        recipes.append(tiny_recipe(tiny_model_folder, output, **yaml.safe_load(stages)))
    package = str(source / ".package")
    env = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, *map(str, recipes)]
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    method, component, stage = (recipe.with_suffix("") for recipe in recipes)
    assert '"method": "diagonal"' in (method / "report.json").read_text(encoding="utf-8")
    assert '"scaled_signs"' in (component / "checkpoint/config.json").read_text(encoding="utf-8")
    assert "of its weighted energy" in ended.stderr
    assert (stage / "checkpoint").is_dir()
