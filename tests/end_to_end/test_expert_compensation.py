"""Compensation of experts lowers the loss of a small trained model on held-out text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trained_experts import LENGTH, markov_text, train_experts

from lrc.compressors.checkpoint.reader import load_checkpoint
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.robustness]


def test_experts_that_compensate_lower_the_loss(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    text = markov_text(640)
    source = tmp_path / "model"
    train_experts(source, text[:512], layers=4, steps=250)

    @torch.no_grad()
    def loss(folder: Path) -> float:
        model: Any = load_checkpoint(folder, dtype=torch.float32).eval()
        rows = text[512:]
        return float(model(input_ids=rows, labels=rows, use_cache=False).loss)

    def increase(name: str, attention: dict[str, Any], experts: dict[str, Any]) -> float:
        method = {"method": "svd-llm", "keep": 0.5}
        recipe = tiny_recipe(
            source,
            tmp_path / name,
            model={"path": str(source), "dtype": "float32"},
            calibration={"source": str(source / "text.txt"), "samples": 96, "length": LENGTH},
            stages=[
                {"decompose": {**method, "targets": ["*.self_attn.*"], **attention}},
                {"decompose": {**method, "targets": ["*.experts.*"], **experts}},
            ],
        )
        report = compress(load_recipe(recipe), Machine("cpu"))
        refit = [each["name"] for each in report["layers"] if each["refit"]]
        assert any("experts" in each for each in refit) == bool(experts)
        return loss(tmp_path / name / "checkpoint") - loss(source)

    without = increase("without", {}, {})
    attention = increase("attention", {"compensate": {}}, {})
    both = increase("both", {"compensate": {}}, {"compensate": {}})
    assert both < 0.95 * attention < attention < without
