"""Every shipped recipe on a tiny model; only keys that would take long are overridden."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_experts import save_experts, tiny_experts

from lrc.configs import shipped

NAMES = shipped.names()


def test_there_are_recipes() -> None:
    assert len(NAMES) > 5


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_runs(
    lrc: Callable[..., Any],
    name: str,
    tiny_model_folder: Path,
    tiny_text: Path,
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    recipe, output = tmp_path / f"{name}.yaml", tmp_path / "run"
    if name in ("reap", "ream"):
        tiny_model_folder = tmp_path / "experts"
        save_experts(tiny_experts("mixtral"), make_tokenizer(), tiny_model_folder)
    recipe.write_text(shipped.read(name), encoding="utf-8")
    perplexity = f"{{source: {tiny_text}, name: english, window: 32, windows: 2}}"
    overrides = [
        f"model={tiny_model_folder}",
        f"calibration.source={tiny_text}",
        "calibration.samples=4",
        "calibration.length=64",
        f"evaluate={{perplexity: [{perplexity}], baselines: []}}",
        f"output={output}",
    ]
    if name == "size":
        overrides.append("stages.0.decompose.size=90kB")
    if "slice:" in recipe.read_text(encoding="utf-8"):  # layers are a small part of the tiny model
        overrides.append("stages.0.slice.keep=0.9")
    text = recipe.read_text(encoding="utf-8")
    if "group_size: 64" in text:  # rows of the tiny model are shorter
        overrides.append("stages.0.quantize.group_size=16")
    if "heal:" in text:
        overrides += [f"stages.1.heal.{key}" for key in ("batch=4", "held_out=128")]
        overrides.append("stages.1.heal.source=python-docs")  # not what is evaluated
        overrides.append("stages.1.heal." + ("steps=3" if name == "block" else "tokens=1000"))
    if name == "cospadi":
        overrides.append("stages.0.decompose.rounds=6")
    if name == "joint":
        overrides.append("stages.0.decompose.schemes=[int8, int4-g16, int3-g16, int2-g16]")
    if name == "drafter":
        overrides.append("stages.0.decompose.schemes=[int8, int4-g16, int3-g16]")
        overrides.append("stages.0.decompose.drafter=[0.6, 0.3]")
    if name == "gguf":  # rows of the tiny model have no blocks; test_llama_cpp.py has those that do
        overrides.append("stages.0.decompose.measure=bits")
        overrides.append("stages.0.decompose.schemes=[int8-g16, int5-g16, int4-g16]")
        overrides.append("stages.0.decompose.embeddings=int8-g16")
    if name == "demo":
        overrides += ["stages.0.decompose.schemes=[int8, int4-g16]", "stages.0.decompose.size=86kB"]
        overrides.append("stages.0.decompose.embeddings=int5-g16")
    ended = lrc("compress", recipe, *overrides, "-q", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    stages = report["recipe"]["stages"]
    slices = [stage for stage in stages if "slice" in stage]
    for stage, cut in zip(slices, report["slices"], strict=True):
        before, after = cut["bytes"]
        assert before * stage["slice"]["keep"] * 0.8 < after <= before * stage["slice"]["keep"]
    decomposed = [stage["decompose"] for stage in stages if "decompose" in stage]
    quantized = any("quantize" in stage for stage in stages)
    changed = any(layer["config"]["components"] for layer in report["layers"])
    assert changed == bool(decomposed or quantized)
    assert not any(layer["fallback"] for layer in report["layers"])
    if name in ("size", "demo"):
        assert report["size"]["model"]["file_bytes"]["compressed"] <= 90_000
    elif quantized or name == "gguf":  # whose embedding counts here, but not in `keep`
        assert report["size"]["targeted"]["kept"] < 0.6
    elif decomposed:
        keep = max(each["keep"] or (each["elastic"] or each["drafter"])[0] for each in decomposed)
        smallest = 0.2 if name == "drafter" else keep - 0.1
        assert smallest < report["size"]["targeted"]["kept"] <= keep
    assert report["evaluation"]["perplexity"]["english"]["compressed"] < 1e4
    assert lrc("inspect", output / "checkpoint", "--verify").code == 0
