"""Scores and removal of experts, against the fused model of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_experts import FAMILIES, tiny_experts
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_check import build_checked
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.source import Source, locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.slicing.reap import best_experts, expert_scores
from lrc.compressors.slicing.slices import FACTS, apply_slice, plan_slices
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Model
from lrc.configs.slice import Reap

REAP = Reap(method="reap", keep=0.85)
COUNT = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
    "granitemoe": "num_local_experts",
    "llama4_text": "num_local_experts",
    "nemotron_h": "n_routed_experts",
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 512, (5, 24), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, family: str) -> tuple[Any, Source]:
    model = tiny_experts(family)
    model.save_pretrained(folder)
    return model, locate(Model(path=str(folder), dtype="float32"))


def context_of(source: Source, tokens: Tensor, journal: Path) -> CalibrationContext:
    architecture = build_checked(source)
    return CalibrationContext(
        architecture,
        WeightReader(source.folder, architecture),
        lambda: tokens,
        Journal(journal),
        "cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
    )


@torch.no_grad()
def test_scores_are_mean_norms_of_weighted_outputs(tokens, tmp_path):
    model, source = saved(tmp_path / "source", "mixtral")
    found = expert_scores(context_of(source, tokens, tmp_path))
    seen: dict[str, tuple[Tensor, ...]] = {}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args)
        )
    model(tokens)
    for name, layer in found.items():
        experts, (x, index, gates) = model.get_submodule(name), seen[name]
        for number in range(4):
            token, place = torch.where(index == number)
            gate, up = (x[token] @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[number].T
            norms = gates[token, place] * y.norm(dim=-1)
            torch.testing.assert_close(
                layer.scores[number], norms.double().mean(), rtol=1e-4, atol=0
            )
            assert layer.tokens[number] == len(token)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_result_is_the_dense_model_without_the_removed_experts(family, tokens, tmp_path):
    model, source = saved(tmp_path / "source", family)
    context = context_of(source, tokens, tmp_path)
    # Experts are a smaller part of the last one.
    options = Reap(method="reap", keep=0.95) if family == "nemotron_h" else REAP
    _, (config,), _ = plan_slices({0: options}, source, context.architecture)
    (tmp_path / "result").mkdir()
    apply_slice(tmp_path / "result", context, options, config, source)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "result", dtype=torch.float32).eval()
    assert getattr(result.config, "quantization_config", None) is None

    dropped = json.loads((tmp_path / "result" / FACTS).read_text())["dropped"]
    n_experts = getattr(model.config, COUNT[family])
    n_kept = getattr(result.config, COUNT[family])
    assert n_kept < n_experts
    expected = model.state_dict()
    for experts, numbers in dropped.items():
        assert len(numbers) == n_experts - n_kept
        chosen = torch.tensor([n for n in range(n_experts) if n not in numbers])
        block = experts.rpartition(".")[0]
        for name, tensor in result.state_dict().items():
            routes = any(f".{part}." in name for part in ("gate", "router"))
            changes = name.startswith(f"{experts}.") or (name.startswith(f"{block}.") and routes)
            if changes and tensor.shape != expected[name].shape:
                expected[name] = expected[name][chosen]
    state = result.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert result.generate(tokens[:1], max_new_tokens=2, do_sample=False).shape[0] == 1


def test_every_group_loses_the_same_number():
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    assert best_experts(scores, 4, groups=1) == [0, 1, 2, 3]
    assert best_experts(scores, 4, groups=2) == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("family", "keep", "words"),
    [
        ("mixtral", 0.5, "2 of 4 experts, of which a token selects 2"),
        ("deepseek_v3", 0.6, "4 of 8 experts, of which a token selects 2"),
    ],
)
def test_a_budget_for_fewer_experts_than_a_token_selects_is_refused(family, keep, words, tmp_path):
    _, source = saved(tmp_path / "source", family)
    with pytest.raises(RecipeError, match=words):
        plan_slices({0: Reap(method="reap", keep=keep)}, source, build_checked(source))


def test_a_model_without_experts_is_refused(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    source = locate(Model(path=str(tmp_path), dtype="float32"))
    with pytest.raises(RecipeError, match="has no experts that could be removed"):
        plan_slices({0: REAP}, source, build_checked(source))
