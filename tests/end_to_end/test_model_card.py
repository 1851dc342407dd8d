"""The metadata of the model card: source, licence, results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from lrc.compressors.io.machine import Machine
from lrc.compressors.model_card import evaluation_results, model_card
from lrc.compressors.models.source import Source, locate
from lrc.compressors.models.source_license import stated_license
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.configs.load import load_recipe
from lrc.configs.recipe import Model


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
    (tmp_path / "models/mine/README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n---\n")
    model = path.format(home=tmp_path)
    recipe = tiny_recipe(Path(model), tmp_path / "run", stages=[{"quantize": {"method": "rtn"}}])
    compress(load_recipe(recipe, [f"model={model}"]), Machine("cpu"))
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    assert "base_model" not in header(card)
    assert header(card)["license"] == "mit"
    assert "# mine, compressed" in card
    assert "models/mine" not in card
    report = json.loads((tmp_path / "run/report.json").read_text())
    report["recipe"]["model"]["path"] = "organization/name"
    card = model_card(report, executed(tmp_path / "run"), plain=True)
    assert header(card)["base_model"] == "organization/name"
    assert "`organization/name`" in card


def test_results_are_those_of_the_compressed_model_in_the_format_of_the_hub() -> None:
    texts = [{"name": "web", "source": "c4"}, {"name": "mine", "source": "texts/mine.txt"}]
    report = {
        "recipe": {"evaluate": {"perplexity": texts}},
        "evaluation": {
            "perplexity": {
                "web": {"dense": 28.3, "compressed": 30.12346, "window": 2048},
                "mine": {"dense": 7.0, "compressed": 8.0, "window": 512},
            },
            "tasks": {"piqa": {"acc": {"dense": 0.7, "compressed": 0.65}, "documents": 500}},
        },
    }
    data = ModelCardData(
        model_name="m", eval_results=[*evaluation_results(report, "text-generation")]
    )
    web, mine, piqa = ModelCard(f"---\n{data.to_yaml()}\n---\n").data.eval_results
    assert (web.dataset_type, web.dataset_split) == ("allenai/c4", "validation")
    assert (web.metric_type, web.metric_value) == ("perplexity", 30.1235)
    assert "2,048" in web.metric_name
    assert (mine.dataset_type, mine.dataset_name, mine.metric_value) == ("mine", "mine", 8.0)
    assert (piqa.dataset_name, piqa.metric_type, piqa.metric_value) == ("piqa", "acc", 0.65)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, {}),
        ("no header", {}),
        ("---\nlicense: [broken\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("text\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense:\nlicense_link: 3\n---\n", {}),
        (
            "---\nlicense: other\nlicense_name: mine\n---\n",
            {"license": "other", "license_name": "mine"},
        ),
    ],
)
def test_a_licence_is_read_from_the_card_of_the_source(
    card: str | None, expected: dict[str, str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = locate(Model(path=str(tiny_model_folder)))
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert stated_license(Source(source.spec, tmp_path, source.config)) == expected


def test_a_licence_is_read_from_the_metadata_of_a_gguf_file(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = locate(Model(path=str(tiny_model_folder)))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = Source(source.spec, tmp_path, source.config, "model.gguf")
    assert stated_license(found) == {"license": "apache-2.0"}
