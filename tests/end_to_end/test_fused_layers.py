"""Plain checkpoints of integers have one format where serving engines fuse layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.fused_layers import fused_groups
from lrc.compressors.planning.plan import Plan
from lrc.configs.load import load_recipe


def mixed(**options: Any) -> dict[str, Any]:
    schemes = ["int8", "int4-g32", "int3-g16"]
    return {
        "decompose": {"method": "mixed", "schemes": schemes, "components": ["dense"], **options}
    }


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
