"""Experts that are multiplied together give the results of the loop, and nothing else changes."""

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.tiny_experts import tiny_experts
from torch import Tensor, nn

from lrc.compressors.latency.latency_table import Product
from lrc.compressors.latency.random_layers import random_layer
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, expert_batches
from lrc.compressors.layers.expert_batches import batch_experts
from lrc.compressors.layers.experts import Expert, SplitExperts, split_experts_, split_modules

FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h")  # gated, with biases, without a gate


def component(kind: str, scheme: str | None = None, **sizes: int) -> ComponentConfig:
    args = None if scheme is None else QuantizationArgs.parse(scheme)
    return ComponentConfig(kind, sizes, args)


DENSE = None
FORMS: dict[str, list[ComponentConfig | None]] = {
    "dense": [DENSE],
    "int4": [component("dense", "int4-g8")],
    "int8": [component("dense", "int8")],
    "int3-asymmetric": [component("dense", "int3-g8-asymmetric")],
    "low_rank": [component("low_rank", rank=5)],
    "low_rank of integers": [component("low_rank", "int8", rank=8)],
    "pivoted": [component("pivoted_low_rank", rank=5)],
    "only pivot rows": [component("pivoted_low_rank", rank=24)],
    "two ranks": [component("low_rank", rank=3), component("low_rank", rank=5)],
    "one of another form": [component("low_rank", rank=3)] * 3 + [DENSE],
    "some that cannot be stacked": [component("sparse", nonzeros=300), DENSE],
    "two components": [component("block_sparse", "int4-g8", groups=40), DENSE],
}


def experts(family: str, form: str) -> SplitExperts:
    """Return the experts of the first layer with matrices of a form; experts take turns."""
    model = tiny_experts(family, hidden_size=32, intermediate_size=24).double()
    split_experts_(model)
    _, module = next(split_modules(model))
    g = torch.Generator().manual_seed(0)
    for number in range(module.n_experts):
        expert = module.get_submodule(str(number))
        chosen = FORMS[form][number % len(FORMS[form])]
        if chosen is None:
            continue
        for name, dense in [*expert.named_children()]:
            if chosen.sizes.get("rank", 0) > min(dense.weight.shape):
                continue
            product = Product(tuple(dense.weight.shape), chosen)
            layer: Any = random_layer(product, dtype=torch.float64, generator=g)
            layer.bias = dense.bias
            for key, buffer in layer.named_buffers():
                if key.endswith("zero_point"):
                    buffer.random_(-(2**31), 2**31 - 1, generator=g)
            expert.add_module(name, layer)
    return module.requires_grad_(False).eval()


Routed = tuple[Tensor, Tensor, Tensor]


def routed(module: SplitExperts, n_tokens: int, top_k: int = 2) -> Routed:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n_tokens, 32, generator=g, dtype=torch.float64)
    scores = torch.rand(n_tokens, module.n_experts, generator=g, dtype=torch.float64)
    scores[:, 1] = 0  # never selected
    weights, index = scores.topk(top_k)
    return x, index, weights


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> Callable[[SplitExperts], SplitExperts]:
    """Stack experts on a CPU."""
    monkeypatch.setattr(expert_batches, "DEVICES", ("cpu",))

    def change(module: SplitExperts) -> SplitExperts:
        batch_experts(nn.ModuleList([module]))
        return module

    return change


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the experts that a loop has called."""
    found: list[int] = []
    forward = Expert.forward

    def counted(self: Expert, x: Tensor, *args: Any) -> Tensor:
        found.append(len(x))
        return forward(self, x, *args)

    monkeypatch.setattr(Expert, "forward", counted)
    return found


@torch.no_grad()
def outputs(module: nn.Module, arguments: Routed) -> Tensor:
    y: Tensor = module(*arguments)
    return y


ALONE = ("some that cannot be stacked", "one of another form", "two components")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_of_the_loop(family, form, batched, calls):
    module = experts(family, form)
    n_tokens = (1, 3, 40)
    expected = [outputs(module, routed(module, n)) for n in n_tokens]
    calls.clear()
    batched(module)
    for n, y in zip(n_tokens, expected, strict=True):
        torch.testing.assert_close(outputs(module, routed(module, n)), y)
    assert bool(calls) == (form in ALONE)


def test_one_token_multiplies_by_the_matrices_of_its_experts_only(batched, monkeypatch):
    module = batched(experts("qwen3_moe", "int4"))
    gathered: list[int] = []
    select = Tensor.index_select

    def counted(self: Tensor, dim: int, ids: Tensor) -> Tensor:
        gathered.append(len(ids))
        return select(self, dim, ids)

    monkeypatch.setattr(Tensor, "index_select", counted)
    outputs(module, routed(module, 1))
    assert set(gathered) == {2}


def test_one_token_needs_no_value_on_the_host(batched):
    """Meta tensors have none: this fails for whatever would wait for a GPU."""
    module = batched(experts("qwen3_moe", "low_rank"))
    (batch,) = module.batches._batches
    x, index, _ = routed(module, 1)
    for stack in (batch.first, batch.second):
        stack._stacked = {
            name: nn.Parameter(t.to("meta"), requires_grad=False)
            for name, t in stack._stacked.items()
        }
    y = module.batches._gathered(batch, x.to("meta"), index.to("meta"), module._activation)
    assert y.shape == (2, 32)
    with pytest.raises((NotImplementedError, RuntimeError)):
        module.batches._padded(x.to("meta"), index.to("meta"), module._activation)


@pytest.mark.parametrize("numbers", [1, 3000])
def test_matrices_are_gathered_in_parts(numbers, batched, monkeypatch):
    monkeypatch.setattr(expert_batches, "NUMBERS", numbers)
    module = experts("qwen3_moe", "int4")
    arguments = routed(module, 30)
    expected = outputs(module, arguments)
    torch.testing.assert_close(outputs(batched(module), arguments), expected)


def test_many_tokens_use_the_loop(batched, calls, monkeypatch):
    module = batched(experts("qwen3_moe", "int4"))
    monkeypatch.setattr(expert_batches, "NUMBERS", 1)
    monkeypatch.setattr(expert_batches, "MOST_TOKENS", 10)
    outputs(module, routed(module, 10))
    assert not calls
    outputs(module, routed(module, 40))
    assert len(calls) == module.n_experts - 1


def test_numbers_beyond_the_experts_add_nothing(batched):
    module = experts("qwen3_moe", "low_rank")
    for n in (1, 20):
        x, index, weights = routed(module, n)
        index[0, 1] = module.n_experts
        module.batches = None
        expected = outputs(module, (x, index, weights))
        found = outputs(batched(module), (x, index, weights))
        torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_the_loop(batched, calls):
    module = batched(experts("qwen3_moe", "low_rank"))
    x, index, weights = routed(module, 3)
    weights.requires_grad_()
    module(x, index, weights).sum().backward()
    assert weights.grad is not None
    assert calls


def changed_data(module: SplitExperts) -> None:
    weight: Any = module.get_submodule("0.up_proj.low_rank.b").weight
    weight.data = weight.data * 2


def other_child(module: SplitExperts) -> None:
    """Replace a factor, as adapters do."""
    low_rank = module.get_submodule("3.down_proj.low_rank")
    low_rank.a = nn.Sequential(low_rank.a, nn.Softplus())


def a_hook(module: SplitExperts) -> None:
    module.get_submodule("2.down_proj").register_forward_hook(lambda _, args, y: 2 * y)


def in_place(module: SplitExperts) -> None:
    module.get_parameter("0.up_proj.low_rank.b.weight").mul_(2)


@pytest.mark.parametrize("change", [changed_data, other_child, a_hook, in_place])
def test_changes_of_an_expert_are_noticed(change, batched):
    plain, module = experts("nemotron_h", "low_rank"), batched(experts("nemotron_h", "low_rank"))
    arguments = routed(module, 4)
    before = outputs(module, arguments)
    change(plain)
    change(module)
    expected = outputs(plain, arguments)
    torch.testing.assert_close(outputs(module, arguments), expected)
    assert not torch.allclose(expected, before, rtol=1e-2)


def test_a_model_that_was_converted_is_stacked_again(batched, calls):
    plain = experts("qwen3_moe", "int4").float()
    module = batched(experts("qwen3_moe", "int4")).float()
    x, index, weights = routed(module, 3)
    arguments = (x.float(), index, weights.float())
    expected = outputs(plain, arguments)
    calls.clear()
    torch.testing.assert_close(outputs(module, arguments), expected, rtol=1e-3, atol=1e-3)
    assert not calls


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied, batched):
    module = batched(experts("qwen3_moe", "low_rank"))
    arguments = routed(module, 4)
    expected = outputs(module, arguments)
    other = copied(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.testing.assert_close(outputs(other, arguments), expected)
    assert not outputs(module, arguments).any()


def test_names_and_values_of_tensors_stay(batched):
    module = experts("gpt_oss", "int3-asymmetric")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    after = batched(module).state_dict()
    assert [*after] == [*before]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    starts = [t.data_ptr() for name, t in after.items() if name.endswith("gate_up_proj.bias")]
    assert len({b - a for a, b in pairwise(starts)}) == 1


def test_experts_on_a_cpu_are_left_as_they_are(calls):
    module = experts("qwen3_moe", "int4")
    batch_experts(nn.ModuleList([module]))
    outputs(module, routed(module, 1))
    assert len(calls) == 2
