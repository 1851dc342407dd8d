"""Moments of the inputs of experts in two models, whose tokens are those of the dense one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_experts import expert_weight, tiny_experts
from torch import Tensor, nn

from lrc.compressors.calibrate import sequential_calibration as module
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.expert_inputs import ExpertInputs, add_moments_, by_matrix
from lrc.compressors.calibrate.layer_check import check_layers
from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.calibrate.statistic_table import RunningSums
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers.experts import split_experts_
from lrc.compressors.models.architecture import build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.moments import token_weights
from lrc.configs.recipe import Model

LAYER = 1
PREFIX = f"model.layers.{LAYER}.mlp.experts"
EXPERTS, D_MODEL = 6, 32


def close(found: Tensor, expected: Tensor) -> None:
    scale = expected.diagonal().abs().mean()
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def received(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the experts of the layer receive: states, selected experts, weights."""
    seen: list[tuple[Tensor, ...]] = []
    experts = model.get_submodule(PREFIX)
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(tokens, use_cache=False)
    hook.remove()
    x, index, gates = seen[0]
    return x, index, gates


@pytest.mark.parametrize("chunk", [EXPERTS, 2])
def test_both_models_give_an_expert_the_tokens_that_the_dense_router_selects(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(2, 512, (6, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 4 * 40)
    monkeypatch.setattr(module, "EXPERT_BYTES", chunk * 2 * 4 * D_MODEL**2)
    dense = tiny_experts("qwen3_moe")
    dense.save_pretrained(tmp_path / "model")
    architecture = check_layers(build(locate(Model(path=str(tmp_path / "model"), dtype="float32"))))
    sequence = SequentialCalibration(
        CalibrationContext(
            architecture,
            WeightReader(tmp_path / "model", architecture),
            lambda: tokens,
            Journal(tmp_path),
            device="cpu",
            memory_limit_gib=1.0,
            seed=0,
            on_step=lambda *_: None,
        )
    )
    changed = copy.deepcopy(dense)
    noise = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def replace(name: str) -> None:
        weight = expert_weight(changed, name)
        weight += 0.1 * torch.randn(weight.shape, generator=noise)
        sequence.insert(name, weight.clone())

    replace("model.layers.0.self_attn.o_proj")
    sequence.advance(0)
    x, index, gates = received(dense, tokens)
    x_hat, other, _ = received(changed, tokens)
    assert not torch.equal(index, other)  # the router of the changed model would select others

    groups = [group for group in sequence.groups(LAYER) if group[0].startswith(PREFIX)]
    leaves = [name.rpartition(".")[2] for (name,) in groups]
    assert leaves == EXPERTS * ["gate_up_proj"] + EXPERTS * ["down_proj"]
    for (name,) in groups:
        number, leaf = name.removeprefix(f"{PREFIX}.").split(".")
        token, place = torch.where(index == int(number))
        own, own_hat, gate = x[token], x_hat[token], gates[token, place, None]
        if leaf == "down_proj":
            pairs = []
            for states, model in ((own, dense), (own_hat, changed)):
                W = expert_weight(model, f"{PREFIX}.{number}.gate_up_proj").detach()
                first, second = (states @ W.T).chunk(2, dim=-1)
                pairs.append(nn.functional.silu(first) * second)
            own, own_hat = pairs
        found = sequence.measure(LAYER, [name], deficit=True)
        assert found.n_tokens == len(token) > 0
        assert not found.deficit
        close(found.H, own_hat.T @ own_hat)
        close(found.cross, own.T @ own_hat)
        gated = sequence.measure(LAYER, [name], deficit=False, gated=True)
        close(gated.H, own_hat.T @ (gate.square() * own_hat))
        close(gated.cross, own.T @ (gate.square() * own_hat))
        replace(name)


def test_a_cap_weights_the_tokens_of_an_expert_in_both_moments() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[3] *= 100
    inputs = ExpertInputs(
        {"top_k_index": torch.zeros(1)}, {"e.1.up": x}, {"e.1": torch.full((50, 1), 0.5)}
    )
    sums = RunningSums()
    add_moments_(sums, "e.1.up", inputs, inputs, d_in=4, window=None, capped=True, gated=True)
    weights = token_weights(x, 50) * 0.25
    assert bool((weights < 0.25).any())
    close(sums["e.1.up.H"], x.T @ (weights * x))
    close(sums["e.1.up.cross"], sums["e.1.up.H"])
    add_moments_(sums, "e.2.up", inputs, inputs, d_in=4, window=None, capped=True, gated=True)
    assert not sums["e.2.up.H"].any()
    assert sums["e.2.up.n"] == 0


def test_layers_without_experts_keep_their_order() -> None:
    model = tiny_experts("qwen3_moe")
    split_experts_(model)
    attention = [[f"model.layers.0.self_attn.{leaf}_proj"] for leaf in "qo"]
    assert by_matrix(model, attention) == attention
