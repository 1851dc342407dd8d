"""What the model card says about the source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.report import model_card
from lrc.configs.load import load_recipe


def header(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


@pytest.mark.parametrize(
    "path", ["~/models/mine", "models/mine", "./models/mine/", "{home}/models/mine"]
)
def test_only_a_hub_id_is_the_base_model(
    path: str,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    executed: Callable[[Path], Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "models/mine")
    model = path.format(home=tmp_path)
    recipe = tiny_recipe(Path(model), tmp_path / "run", stages=[{"quantize": {"method": "rtn"}}])
    compress(load_recipe(recipe, [f"model={model}"]), Machine("cpu"))
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    assert "base_model" not in header(card)
    assert "# mine, compressed" in card
    assert "models/mine" not in card
    report = json.loads((tmp_path / "run/report.json").read_text())
    report["recipe"]["model"]["path"] = "organization/name"
    card = model_card(report, executed(tmp_path / "run"), plain=True)
    assert header(card)["base_model"] == "organization/name"
    assert "`organization/name`" in card
