"""Split experts compute what the modules of transformers compute, from the same numbers."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.tiny_experts import FAMILIES, tiny_experts
from torch import Tensor, nn

from lrc.compressors.layers.experts import (
    Expert,
    fuse_experts_,
    fused_modules,
    ordinary_linears,
    split_experts_,
    split_modules,
)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    model = tiny_experts(request.param).double()
    if model._can_set_experts_implementation():  # torch has no grouped_mm of doubles
        model.set_experts_implementation("eager")
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_a_split_model_gives_the_logits_of_the_original(model, tokens, implementation):
    if model._can_set_experts_implementation():
        model.set_experts_implementation(implementation)
    expected = logits(model, tokens)
    split_experts_(model)
    assert [*split_modules(model)]
    found = logits(model, tokens)
    # Some classes compute parts in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_router_and_the_experts(model, tokens):
    split = deepcopy(model)
    split_experts_(split)
    for each in (model, split):
        each(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    ours = {name: p.grad for name, p in split.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in ours and parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-8)
    for name, module in split_modules(split):
        for tensor in module.tensors:
            joined = tensor.join(
                [
                    torch.zeros_like(p) if p.grad is None else p.grad
                    for e in range(module.n_experts)
                    for p in [module.get_parameter(tensor.name_of(e))]
                ]
            )
            expected = model.get_parameter(f"{name}.{tensor.leaf}").grad
            torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-8)


def test_matrices_are_views_of_the_fused_parameters(model):
    stored = {name: p.data_ptr() for name, p in model.named_parameters()}
    split_experts_(model)
    for name, module in split_modules(model):
        for tensor in module.tensors:
            first = module.get_parameter(tensor.name_of(0))
            assert first.data_ptr() == stored[f"{name}.{tensor.leaf}"]


def test_fusing_undoes_splitting(model, tokens):
    names, state = fused_modules(model), deepcopy(model.state_dict())
    expected = logits(model, tokens)
    split_experts_(model)
    copied = deepcopy(model)
    for each in (model, copied):
        fuse_experts_(each)
        assert fused_modules(each) == names
        assert each.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[n]) for n, tensor in each.state_dict().items())
        assert torch.equal(logits(each, tokens), expected)


def test_experts_without_tokens_are_not_called(tokens):
    model = tiny_experts("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[2] = -1e4
    split_experts_(model)
    called = set()
    for name, module in model.named_modules():
        if isinstance(module, Expert):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    logits(model, tokens)
    numbers = [name.rpartition(".")[2] for name in called if name.startswith("model.layers.0.")]
    assert sorted(numbers) == ["0", "1", "3"]


def test_linears_of_experts_are_not_those_of_the_class():
    model = tiny_experts("qwen3_moe")
    before = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    split_experts_(model)
    assert ordinary_linears(model) == before


def test_modules_with_other_parameters_are_not_split():
    model = tiny_experts("mixtral")
    model.model.layers[1].mlp.experts.scale = nn.Parameter(torch.ones(4))
    assert fused_modules(model) == ["model.layers.0.mlp.experts"]
