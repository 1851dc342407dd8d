"""Layers that share a factor: it is stored once and looked up for every call."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.format import parse_modules
from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.layers import COMPONENTS, ComponentConfig, QuantizationArgs, WeightConfig
from lrc.configs.errors import CheckpointError

OWNERS = {
    "low_rank": ComponentConfig("low_rank", {"rank": 3}),
    "dictionary": ComponentConfig("dictionary", {"atoms": 3, "nonzeros": 2}),
}
SHAPES = {"zero": (5, 8), "one": (6, 8), "two": (7, 8)}


def test_every_component_that_can_share_is_covered() -> None:
    assert OWNERS.keys() == {kind for kind, found in COMPONENTS.items() if found.SHARED_SIZE}


@pytest.fixture(params=OWNERS)
def kind(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def group(**linears: tuple[int, int]) -> nn.Module:
    """Make a model of linear layers, name -> (d_out, d_in)."""
    model = nn.Module()
    for name, (d_out, d_in) in linears.items():
        block = nn.Module()
        block.proj = nn.Linear(d_in, d_out, bias=False)
        model.add_module(name, block)
    return model


def component(block: Any, kind: str) -> Any:
    return block.proj.get_submodule(kind)


def modules_of(kind: str) -> dict[str, WeightConfig]:
    """Return a member, its owner after it, and another member."""
    member = replace(OWNERS[kind], shares="one.proj")
    return {
        "zero.proj": WeightConfig(SHAPES["zero"], (member,)),
        "one.proj": WeightConfig(SHAPES["one"], (OWNERS[kind],)),
        "two.proj": WeightConfig(SHAPES["two"], (member,)),
    }


@pytest.fixture
def model(kind: str) -> nn.Module:
    model = group(**SHAPES)
    replace_layers(model, modules_of(kind))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=g)
        for mask in (b for name, b in model.named_buffers() if name.endswith(".mask")):
            mask.fill_(0b101)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def test_the_shared_factor_is_stored_once(model: nn.Module, kind: str) -> None:
    assert {name for name in model.state_dict() if name.endswith(".a.weight")} == {
        f"one.proj.{kind}.a.weight"
    }
    assert len(list(model.parameters())) == 1 + 3
    assert "owner" not in dict(model.zero.proj.named_modules())


def test_the_owner_is_looked_up_for_every_call(model: nn.Module, x: Tensor, kind: str) -> None:
    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    before = model.zero.proj(x)
    owner = component(model.one, kind)
    owner.a = Adapted(owner.a)
    torch.testing.assert_close(model.zero.proj(x), 2 * before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_model_shares_within_itself(
    model: nn.Module, x: Tensor, copied: Any, kind: str
) -> None:
    twin = copied(model)
    zero, one, two = (component(block, kind) for block in (twin.zero, twin.one, twin.two))
    assert zero.owner is two.owner is one
    assert one is not component(model.one, kind)
    torch.testing.assert_close(twin.two.proj(x), model.two.proj(x))


def test_dense_layers_do_not_need_the_owner(
    model: nn.Module, x: Tensor, rounding: Callable[..., float], kind: str
) -> None:
    expected = model.zero.proj(x).detach()
    dense = model.zero.proj.to_dense()
    nn.init.zeros_(component(model.one, kind).a.weight)
    close = rounding(8 + 3, torch.float32) * float(expected.abs().max())
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=close)


OWN_BITS = {"low_rank": 6 * 3 * 16 + 8, "dictionary": 6 * (2 * 16 + 8) + 8}


def test_the_shared_factor_counts_for_its_owner_only(kind: str) -> None:
    alone = WeightConfig((6, 8), (OWNERS[kind],))
    member = WeightConfig((6, 8), (replace(OWNERS[kind], shares="one.proj"),))
    assert member.stored_bits(16) == OWN_BITS[kind]
    assert alone.stored_bits(16) - member.stored_bits(16) == 3 * 8 * 16
    assert alone.parameters() - member.parameters() == 3 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_group_cut_in_two_by_devices_still_computes(model: nn.Module, x: Tensor) -> None:
    expected = model.two.proj(x)
    model.two.proj.cuda()
    found = model.two.proj(x.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)


OTHER = {"low_rank": "dictionary", "dictionary": "low_rank"}
WRONG: dict[str, Callable[[ComponentConfig], ComponentConfig]] = {
    "an unknown layer": lambda c: replace(c, shares="x"),
    "itself": lambda c: replace(c, shares="zero.proj"),
    "a layer that shares itself": lambda c: replace(c, shares="two.proj"),
    "a factor of another size": lambda c: replace(c, sizes=dict.fromkeys(c.sizes, 2)),
    "a factor of other numbers": lambda c: replace(c, quantization=QuantizationArgs(8)),
    "a component of another type": lambda c: replace(OWNERS[OTHER[c.type]], shares="one.proj"),
}


def load(modules: dict[str, WeightConfig], shapes: dict[str, tuple[int, int]]) -> None:
    """Replace the layers of a model by what a checkpoint says."""
    found = parse_modules({name: c.to_json() for name, c in modules.items()}, "config.json")
    assert found == modules
    replace_layers(group(**shapes), found)


@pytest.mark.parametrize("case", WRONG)
def test_factors_that_cannot_be_shared_are_rejected(case: str, kind: str) -> None:
    modules = modules_of(kind)
    load(modules, SHAPES)
    (right,) = modules["zero.proj"].components
    modules["zero.proj"] = WeightConfig(SHAPES["zero"], (WRONG[case](right),))
    with pytest.raises(CheckpointError, match=r"modules\['zero.proj'\]:? .*(share|factor)"):
        load(modules, SHAPES)


def test_an_owner_of_another_width_is_rejected(kind: str) -> None:
    modules = modules_of(kind)
    modules["zero.proj"] = replace(modules["zero.proj"], shape=(5, 9))
    words = r"modules\['zero.proj'\]: the layer that stores .* 3, 9 inputs .* with \d+ inputs"
    with pytest.raises(CheckpointError, match=words):
        load(modules, SHAPES | {"zero": (5, 9)})
