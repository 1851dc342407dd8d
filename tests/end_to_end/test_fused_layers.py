"""Plain checkpoints of integers have one format where serving engines fuse layers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.fused_layers import fused_groups
from lrc.compressors.planning.plan import Plan
from lrc.configs.engines import ENGINES
from lrc.configs.load import load_recipe


def mixed(**options: Any) -> dict[str, Any]:
    schemes = ["int8", "int4-g32", "int3-g16"]
    fixed = {"method": "mixed", "schemes": schemes, "components": ["dense"]}
    return {"decompose": {**fixed, **options}}


def rtn(**options: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", **options}}


@pytest.mark.parametrize("keep", [0.3, 0.32])
@pytest.mark.parametrize("embeddings", [None, "int8"])
def test_a_joint_plan_of_integers_gives_fused_layers_one_scheme(
    keep: float,
    embeddings: str | None,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    executed: Callable[[Path], Plan],
    tmp_path: Path,
) -> None:
    stages = [mixed(keep=keep, embeddings=embeddings)]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    report = compress(load_recipe(recipe), Machine("cpu"))
    modules = executed(tmp_path / "run").modules()
    found = [[modules.get(name) for name in group] for group in fused_groups(modules)]
    assert len(found) == 4
    mixes = [len({config and config.quantization for config in group}) > 1 for group in found]
    assert any(mixes) == (embeddings is not None)  # which no engine reads, so nothing is given up
    if embeddings is None:
        assert report["size"]["targeted"]["kept"] <= keep
    assert not any("fuse" in text for text in report["warnings"])


@pytest.mark.parametrize("keep", [0.45, 0.5])
def test_a_served_plan_loads_in_vllm(
    keep: float,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    executed: Callable[[Path], Plan],
    tmp_path: Path,
) -> None:
    stages = [mixed(keep=keep, serve="vllm", schemes=["int8-g32", "int4-g32"])]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    report = compress(load_recipe(recipe), Machine("cpu"))
    plan = executed(tmp_path / "run")
    found = {task.name: plan.stored_config(task).quantization for task in plan.tasks}
    groups = fused_groups(found)
    assert [len(group) for group in groups] == [3, 2, 3, 2]
    assert all(len({found[name] for name in group}) == 1 for group in groups)
    assert len({*found.values()}) > 1
    assert {str(each) for each in found.values() if each} <= {*ENGINES["vllm"].schemes}
    assert not any("vLLM" in text for text in report["warnings"])
    # As vLLM reads it: one format, and targets, for all layers that it fuses.
    block = json.loads((tmp_path / "run/checkpoint/config.json").read_text())
    block = block["quantization_config"]
    assert block["quant_method"] == "compressed-tensors"
    for group in groups:
        matched = [
            [
                entry["weights"]
                for entry in block["config_groups"].values()
                if any(re.match(target.removeprefix("re:"), name) for target in entry["targets"])
            ]
            for name in group
        ]
        assert all(each == matched[0] and len(each) <= 1 for each in matched)
        assert bool(matched[0]) == (found[group[0]] is not None)


SERVED = rtn(bits=4, serve="vllm")
UNEVEN = {"method": "modegpt", "keep": 0.9, "heads": False, "uniform": False, "width_multiple": 4}
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "formats": (
        [rtn(targets=["*.q_proj"], bits=4, serve="vllm"), rtn(ignore=["*.q_proj"])],
        "stages[0].quantize.serve: needs the same format for all layers that vLLM fuses, got "
        "q_proj, k_proj, v_proj of model.layers.0.self_attn with",
    ),
    "widths": (
        [{"slice": UNEVEN}, SERVED],
        "stages[1].quantize.serve: needs a model that config.json describes, got uniform: False",
    ),
    "embedding": (
        [SERVED, rtn(targets=[], embeddings="int8")],
        "got model.embed_tokens quantized by stages[1]; leave out 'embeddings'",
    ),
    "adapters": (
        [
            SERVED,
            {"heal": {"method": "distill", "train": "lora", "merge": False, "rank": 1, "steps": 1}},
        ],
        "got low-rank components that stages[1].heal adds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_served_plan_refuses_what_only_lrc_reads(
    name: str, tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path, lrc: Any
) -> None:
    stages, expected = REFUSED[name]
    ended = lrc("plan", tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages))
    assert ended.code == 2
    assert "error[not-servable]" in ended.err, ended.err
    assert expected in ended.err


MIXES: dict[str, list[dict[str, Any]]] = {
    "one left out": [rtn(ignore=["*.k_proj"])],
    "one alone": [rtn(targets=["*.up_proj"])],
    "other bits": [rtn(targets=["*.q_proj"], bits=4), rtn(ignore=["*.q_proj"])],
    "left out of a joint plan": [mixed(keep=0.5, ignore=["*.gate_proj"])],
}
UNIFORM: dict[str, list[dict[str, Any]]] = {
    "all": [rtn()],
    "all of MLPs": [rtn(targets=["*.mlp.*"])],
    "whole groups differ": [rtn(targets=["*.mlp.*"], bits=4), rtn(ignore=["*.mlp.*"])],
    "a checkpoint for lrc": [rtn(ignore=["*.k_proj"], symmetric=False)],
    "an integer embedding": [rtn(ignore=["*.k_proj"], embeddings="int8")],
    "low rank": [{"decompose": {"method": "svd-llm", "keep": 0.8, "ignore": ["*.k_proj"]}}],
}


@pytest.mark.parametrize("name", MIXES | UNIFORM)
def test_a_plan_warns_of_fused_layers_with_different_formats(
    name: str, tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path, lrc: Any
) -> None:
    stages = (MIXES | UNIFORM)[name]
    ended = lrc("plan", tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages))
    assert ended.code == 0, ended.err
    assert ("serving engines that fuse" in " ".join(ended.out.split())) == (name in MIXES)
