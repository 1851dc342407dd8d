"""Predicted losses of a small trained mixture of experts against measured ones.

Predictions are second-order expansions of the loss around the dense model, in which every token
keeps its experts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trained_experts import LENGTH, markov_text, train_experts
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.compress import profile as module
from lrc.compressors.compress.layer_effects import LayerEffects
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import profile
from lrc.configs.load import load_recipe

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.robustness]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    """Train a model for seconds."""
    folder: Path = tmp_path_factory.mktemp("trained")
    assert train_experts(folder, markov_text(512), layers=2, steps=80) < 3.9
    return folder


@pytest.fixture
def measure(
    trained: Path, tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> Callable[..., tuple[list[float], list[float]]]:
    """Return predicted and measured divergences of all matrices, one compressed at a time."""
    route, advance = Qwen3MoeTopKRouter.forward, LayerExecutor.advance_batch_
    dense: dict[tuple[int, int], Tensor] = {}  # by router and first window of the batch
    batch, held = [0], [False]

    def routed(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, gates, index = route(self, x)
        if not held[0]:
            dense[id(self), batch[0]] = index
            return logits, gates, index
        index = dense[id(self), batch[0]]
        gates = logits.softmax(-1).gather(-1, index)
        return logits, gates / gates.sum(-1, keepdim=True), index

    def advanced(self: Any, index: int, states: Tensor, rows: slice, layer: Any = None) -> None:
        batch[0] = rows.start
        advance(self, index, states, rows, layer)

    class Held(LayerEffects):
        """Every token keeps the experts that it has in the dense model."""

        def measure(self, tasks: Any) -> Any:
            states = torch.empty(self.executor.shape)
            self.executor.embed_(states)
            for index in range(len(self.context.architecture.layers)):
                with self.executor.layer(index):
                    self.executor.advance_(index, states)
            held[0] = True
            try:
                return super().measure(tasks)
            finally:
                held[0] = False

    def run(*, hold: bool) -> tuple[list[float], list[float]]:
        if hold:
            monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", routed)
            monkeypatch.setattr(LayerExecutor, "advance_batch_", advanced)
            monkeypatch.setattr(module, "LayerEffects", Held)
        recipe = tiny_recipe(
            trained,
            tmp_path / str(hold),
            model={"path": str(trained), "dtype": "float32"},
            calibration={"source": str(trained / "text.txt"), "samples": 48, "length": LENGTH},
            stages=[{"decompose": {"method": "kfac", "keep": 0.7, "allocation": "uniform"}}],
        )
        found, measured = profile(load_recipe(recipe), 8, Machine("cpu"))
        nats = {name: result.predicted_nats for name, result in found.plan.results.items()}
        return measured.compared(nats)

    return run


def test_losses_are_as_predicted_if_tokens_keep_their_experts(measure):
    predicted, measured = measure(hold=True)
    assert len(predicted) == 2 * (4 + 2 * 6)
    ratios = sorted(real / value for value, real in zip(predicted, measured, strict=True))
    assert 0.8 < sum(measured) / sum(predicted) < 1.25
    assert 0.6 < ratios[len(ratios) // 2] < 1.6


def test_tokens_that_change_their_experts_add_to_the_loss(measure):
    """A new expert changes the output at once, however small the change that selected it."""
    predicted, measured = measure(hold=False)
    assert sum(measured) > 1.25 * sum(predicted)
