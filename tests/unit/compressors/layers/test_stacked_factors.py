"""Layers that receive the same input multiply by one tensor, and nothing else changes."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.utils.other import clean_state_dict_for_safetensors
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.kernels import one_row
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.layers.siblings import share_inputs

D, WIDTHS = 32, {"q_proj": 24, "k_proj": 9, "v_proj": 16}
RANKS = {"q_proj": 7, "k_proj": 3, "v_proj": 5}


class Attention(nn.Module):
    """Not one, but it passes its inputs on like one."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in WIDTHS.items():
            self.add_module(name, nn.Linear(D, width, bias=False, dtype=torch.float64))
        self.o_proj = nn.Linear(D, D, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], dim=-1)


def component(kind: str, rank: int) -> ComponentConfig:
    return ComponentConfig(kind, {"rank": rank})


def make(kinds: tuple[str, str, str] = ("low_rank", "pivoted_low_rank", "low_rank")) -> Any:
    model = Attention()
    table = {
        name: WeightConfig((WIDTHS[name], D), (component(kind, RANKS[name]),))
        for name, kind in zip(WIDTHS, kinds, strict=True)
    }
    replace_layers(model, table | {"o_proj": WeightConfig((D, D), (component("low_rank", 4),))})
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=g)
    for name, buffer in model.named_buffers():
        if name.endswith("order"):
            buffer.copy_(torch.randperm(len(buffer), generator=g))
    return model.eval()


def first_factors(model: Any) -> list[Any]:
    found = [next(iter(model.get_submodule(name).components)) for name in WIDTHS]
    return [component.a for component in found]


def is_stacked(model: Any) -> bool:
    weights = [a.weight for a in first_factors(model)]
    starts = [weight.data_ptr() for weight in weights]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    return starts[1:] == ends[:-1]


def products(model: Any, x: Tensor) -> list[int]:
    """Return the widths of the products with first factors in a pass without gradients."""
    found: list[int] = []
    linear = nn.functional.linear

    def counted(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        if W.shape[-1] == D:
            found.append(len(W))
        return linear(x, W, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "linear", counted)
        model(x)
    return found


def test_the_factors_that_were_moved_are_reported() -> None:
    model, replaced = make(), list[Tensor]()
    before = {a.weight.data_ptr(): a.weight.clone() for a in first_factors(model)}
    assert len(share_inputs(model, replaced=replaced.extend)) == 1
    assert {tensor.data_ptr() for tensor in replaced} == before.keys()
    assert all(torch.equal(tensor, before[tensor.data_ptr()]) for tensor in replaced)
    assert not before.keys() & {a.weight.data_ptr() for a in first_factors(model)}


ALONE, TOGETHER = list(RANKS.values()), [sum(RANKS.values())]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def expected(x: Tensor) -> Tensor:
    result: Tensor = make()(x).detach()
    return result


@pytest.fixture
def model() -> Any:
    model = make()
    (group,) = share_inputs(model)  # without o_proj, which has other inputs
    model.group = [group]  # a list, so that it is not mistaken for a part of the model
    return model


@pytest.fixture
def close(rounding: Callable[..., float], expected: Tensor) -> Callable[..., None]:
    def check(found: Tensor, wanted: Tensor = expected) -> None:
        atol = rounding(D) * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)

    return check


def test_one_product_gives_the_same(model, x, close) -> None:
    assert is_stacked(model)
    for _ in range(2):
        assert products(model, x) == TOGETHER
        with torch.no_grad():
            close(model(x))
        with torch.inference_mode():
            close(model(x))


def test_nothing_is_held_after_a_pass(model, x) -> None:
    again = x.clone()
    with torch.no_grad():
        model(again)
    seen = weakref.ref(again)
    del again
    gc.collect()
    assert seen() is None


def test_gradients_reach_every_factor_and_training_is_seen(model, x, close) -> None:
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert all(a.weight.grad is not None for a in first_factors(model))
    assert is_stacked(model)
    assert products(model, x) == TOGETHER
    with torch.no_grad():
        tuned = model(x)
    close(tuned, model(x).detach())


def test_a_pass_that_begins_without_gradients_does_not_lose_them(model, x) -> None:
    with torch.no_grad():
        model.q_proj(x)
    model.k_proj(x).sum().backward()
    assert model.k_proj.pivoted_low_rank.a.weight.grad is not None


def test_an_input_that_is_modified_in_between_is_multiplied_again(model, x, close) -> None:
    with torch.no_grad():
        model(x)
        model.q_proj(x)
        x.mul_(2)
        doubled = model.k_proj(x)
    close(doubled, model.k_proj(x).detach())


MOVES: dict[str, Callable[[Any], Any]] = {
    "float": lambda m: m.float(),
    "copy": copy.deepcopy,
    "file": lambda m: pickle.loads(pickle.dumps(m)),
    "assigned": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and m,
    "loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())) and m,
    "meta and back": lambda m: _through_meta(m),
}


def _through_meta(model: Any) -> Any:
    state = copy.deepcopy(model.state_dict())
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        assert "inverse" not in name or buffer is not None
    return model


@pytest.mark.parametrize("move", MOVES)
def test_moved_weights_are_stacked_again(model, x, expected, move) -> None:
    moved = MOVES[move](model)
    x = x.to(next(moved.parameters()).dtype)
    with torch.no_grad():
        found = moved(x)
    assert products(moved, x) == TOGETHER
    assert is_stacked(moved)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    if moved is not model:
        with torch.no_grad():
            for a in first_factors(model):
                a.weight.zero_()
            torch.testing.assert_close(moved(x), found)


def test_conversion_stacks_at_once(model) -> None:
    model.bfloat16()
    assert is_stacked(model)


def test_a_layer_of_another_dtype_multiplies_alone(model, x) -> None:
    model.k_proj.float()
    model.k_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    assert products(model, x) == ALONE


def test_a_replaced_weight_is_used(model, x, close) -> None:
    first_factors(model)[1].weight = nn.Parameter(torch.ones(3, D, dtype=torch.float64))
    with torch.no_grad():
        found = model(x)
    close(found, model(x).detach())
    first_factors(model)[2].weight.data = torch.ones(5, D, dtype=torch.float64)
    with torch.no_grad():
        found = model(x)
    close(found, model(x).detach())


def test_adapters_and_hooks_are_called(model, x) -> None:
    a = first_factors(model)[1]
    handle = a.register_forward_hook(lambda _, __, y: 2 * y)
    with torch.no_grad():
        assert torch.equal(model.k_proj(x), model(x)[..., 24:33])
    assert products(model, x) == ALONE
    handle.remove()
    assert products(model, x) == TOGETHER

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.inner(x)

    with torch.no_grad():
        before = model.k_proj(x)
        model.k_proj.pivoted_low_rank.a = Adapted(a)
        torch.testing.assert_close(model(x)[..., 24:33], 3 * before)


def test_other_inputs_dissolve_the_group(x, close) -> None:
    model = make()
    (group,) = share_inputs(model)
    other = x.flip(0)
    with torch.no_grad():
        close(model(x, other), model(x, other))
        assert group._dissolved
        found = model(x, other)
    close(found, model(x, other).detach())
    assert products(model, x) == ALONE


def test_a_saved_file_has_every_factor(model, tmp_path) -> None:
    save_model(model, str(tmp_path / "model.safetensors"))
    save_file(model.state_dict(), tmp_path / "again.safetensors")
    assert len(pickle.dumps(model)) < len(pickle.dumps(make())) + 2000
    assert len(clean_state_dict_for_safetensors(model.state_dict())) == len(model.state_dict())
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor)


def test_quantized_and_shared_factors_are_not_stacked() -> None:
    args = QuantizationArgs(8)
    model = Attention()
    kinds = {
        "q_proj": ComponentConfig("low_rank", {"rank": 3}),
        "k_proj": ComponentConfig("low_rank", {"rank": 3}, shares="q_proj"),
        "v_proj": ComponentConfig("low_rank", {"rank": 3}, quantization=args),
    }
    replace_layers(model, {n: WeightConfig((WIDTHS[n], D), (c,)) for n, c in kinds.items()})
    assert not share_inputs(model)


def test_a_compiled_pass_is_one_graph_that_fits_every_call(model, x, close) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        close(compiled(x))
        model(x)
        close(compiled(x))
    assert counter.frame_count == 1
    # CUDA graphs read it where it is.
    assert model.group[0]._weight._dynamo_static_input_type == "unguarded"
    with torch.no_grad():
        first_factors(model)[1].weight = nn.Parameter(torch.ones(3, D, dtype=torch.float64))
        close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert first_factors(model)[1].weight.grad is not None


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_layers_without_siblings_get_the_kernel_for_one_row(monkeypatch: Any) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(one_row, "prepare", asked.append)
    layer = make().o_proj
    assert share_inputs(layer) == []
    assert asked == [torch.device("cpu")] * 2  # both factors
    layer.to("meta")
    assert asked[2:] == [torch.device("meta")] * 2
