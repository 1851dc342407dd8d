"""Experts are merged neuron by neuron, and everything else stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_experts import tiny_experts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_check import build_checked
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers.experts import SplitExperts, split_experts_, split_modules
from lrc.compressors.models.source import Source, locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.slicing.ream import _Merging, neuron_rows
from lrc.compressors.slicing.slices import FACTS, apply_slice, plan_slices
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Model
from lrc.configs.slice import Ream

FAMILIES = {  # those whose experts are stored in different ways, and the part of them that is kept
    "qwen3_moe": 0.8,
    "gpt_oss": 0.9,
    "deepseek_v3": 0.85,
    "nemotron_h": 0.95,
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 512, (6, 40), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, family: str) -> tuple[Any, Source]:
    model = tiny_experts(family)
    model.save_pretrained(folder)
    return model, locate(Model(path=str(folder), dtype="float32"))


def sliced(source: Source, tokens: Tensor, options: Ream, folder: Path) -> tuple[Any, Any]:
    architecture = build_checked(source)
    _, (config,), _ = plan_slices({0: options}, source, architecture)
    context = CalibrationContext(
        architecture,
        WeightReader(source.folder, architecture),
        lambda: tokens,
        Journal(folder / "journal"),
        "cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
    )
    (folder / "result").mkdir()
    apply_slice(folder / "result", context, options, config, source)
    model = AutoModelForCausalLM.from_pretrained(folder / "result", dtype=torch.float32).eval()
    return model, json.loads((folder / "result" / FACTS).read_text())


def split(family: str) -> SplitExperts:
    model = tiny_experts(family).double()
    split_experts_(model)
    return next(module for _, module in split_modules(model))


def expert_output(module: SplitExperts, number: int, x: Tensor) -> Tensor:
    first, second = module.get_submodule(str(number)).children()
    y: Tensor = second(module._activation(first(x)))
    return y


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_copies_with_neurons_in_another_order_are_merged_without_loss(family):
    g = torch.Generator().manual_seed(0)
    module = split(family)
    first, second = (list(module.get_submodule(n).children()) for n in ("0", "1"))
    width = second[1].in_features
    order = torch.randperm(width, generator=g)
    for rows in neuron_rows(module):
        for to, origin in zip(second[0].parameters(), first[0].parameters(), strict=True):
            to[rows] = origin[rows[order]]
    second[1].weight.copy_(first[1].weight[:, order])
    if first[1].bias is not None:
        second[1].bias.copy_(first[1].bias)
    x = torch.randn(30, 32, generator=g, dtype=torch.float64)
    torch.testing.assert_close(expert_output(module, 1, x), expert_output(module, 0, x))

    activations = [
        module._activation(next(module.get_submodule(str(n)).children())(x)).T
        for n in range(module.n_experts)
    ]
    merging = _Merging(module, activations, torch.rand(module.n_experts, generator=g), seed=0)
    merged = merging.merged([1, 0])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, module.get_parameter(name))


@torch.no_grad()
def test_weights_are_averaged_by_the_scores():
    module = split("qwen3_moe")
    same = [torch.eye(24, dtype=torch.float64)] * 6  # which decides the order of the neurons
    weights = torch.tensor([1.0, 2.0, 5.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    merging = _Merging(module, same, weights, seed=0)
    merging._reduced[:] = 0
    found = merging.merged([2, 0, 1])["2.down_proj.weight"]
    parts = [module.get_parameter(f"{n}.down_proj.weight") for n in range(3)]
    torch.testing.assert_close(found, (parts[0] + 2 * parts[1] + 5 * parts[2]) / 8)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_merged_model_is_plain_and_its_groups_hold_every_expert(family, tokens, tmp_path):
    dense, source = saved(tmp_path / "source", family)
    options = Ream(method="ream", keep=FAMILIES[family])
    model, facts = sliced(source, tokens, options, tmp_path)
    assert getattr(model.config, "quantization_config", None) is None
    before, after = dense.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    merged = 0
    for experts, groups in facts["groups"].items():
        kept, n_experts = [group[0] for group in groups], len(facts["scores"][experts])
        assert kept == sorted(kept)
        assert sorted(n for group in groups for n in group) == [*range(n_experts)]
        block = experts.rpartition(".")[0]
        for name in (name for name in before if name.startswith(f"{block}.")):
            if before[name].shape == after[name].shape:
                assert torch.equal(before[name], after[name])
            elif not name.startswith(f"{experts}."):
                assert torch.equal(before[name][kept], after[name])
            else:
                for place, group in enumerate(groups):
                    equal = torch.equal(before[name][group[0]], after[name][place])
                    assert equal == (len(group) == 1)
                    merged += not equal
    assert merged
    assert model.generate(tokens[:1], max_new_tokens=2, do_sample=False).shape[0] == 1


@torch.no_grad()
def test_later_layers_are_merged_on_the_outputs_of_merged_ones(tokens, tmp_path):
    """The scores of the second layer are those of a model whose first layer is merged."""
    _, source = saved(tmp_path / "source", "qwen3_moe")
    model, facts = sliced(source, tokens, Ream(method="ream", keep=0.8), tmp_path)
    dense, _ = saved(tmp_path / "again", "qwen3_moe")
    model.model.layers[1] = dense.model.layers[1]
    experts = model.model.layers[1].mlp.experts
    seen: list[tuple[Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(tokens)
    ((x, index, gates),) = seen
    for number, score in enumerate(facts["scores"]["model.layers.1.mlp.experts"]):
        token, place = torch.where(index == number)
        gate, up = (x[token] @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
        y = (nn.functional.silu(gate) * up) @ experts.down_proj[number].T
        expected = float((gates[token, place] * y.norm(dim=-1)).mean())
        assert score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("mixtral", {"keep": 0.5}, "2 of 4 experts, of which a token selects 2"),
        ("qwen3_moe", {"keep": 0.74, "group_size": 2}, "raise group_size to 3"),
        ("llama4_text", {"keep": 0.9}, "cannot be merged: they receive all tokens; use reap"),
    ],
)
def test_what_cannot_be_merged_is_refused(family, options, words, tmp_path):
    _, source = saved(tmp_path / "source", family)
    with pytest.raises(RecipeError, match=words):
        plan_slices({0: Ream(method="ream", **options)}, source, build_checked(source))
