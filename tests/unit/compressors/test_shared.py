"""Layers that share a factor: stored once, looked up each time."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.format import check_modules
from lrc.compressors.checkpoint.quantizer import swap_in_forms
from lrc.compressors.layers import LowRank, SharedLowRank
from lrc.configs.errors import CheckpointError

OWNER = {"form": "low_rank", "rank": 3}
MEMBER = {"form": "shared_low_rank", "rank": 3, "shares": "one.proj"}


def group(**linears: tuple[int, int]) -> nn.Module:
    """Make a model of linears, name -> (d_out, d_in)."""
    model = nn.Module()
    for name, (d_out, d_in) in linears.items():
        block = nn.Module()
        block.proj = nn.Linear(d_in, d_out, bias=False)
        model.add_module(name, block)
    return model


@pytest.fixture
def model() -> nn.Module:
    """Return a member, its owner after it, and another member."""
    model = group(zero=(5, 8), one=(6, 8), two=(7, 8))
    swap_in_forms(model, {"zero.proj": MEMBER, "one.proj": OWNER, "two.proj": MEMBER})
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=g)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def test_the_shared_factor_is_stored_once(model: nn.Module) -> None:
    assert {name for name in model.state_dict() if name.endswith(".a.weight")} == {
        "one.proj.a.weight"
    }
    assert len(list(model.parameters())) == 1 + 3
    assert isinstance(model.one.proj, LowRank)
    assert "owner" not in dict(model.zero.proj.named_modules())


def test_the_owner_is_looked_up_each_time(model: nn.Module, x: Tensor) -> None:
    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    before = model.zero.proj(x)
    model.one.proj.a = Adapted(model.one.proj.a)
    torch.testing.assert_close(model.zero.proj(x), 2 * before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_model_shares_within_itself(model: nn.Module, x: Tensor, copied: Any) -> None:
    twin = copied(model)
    assert twin.zero.proj.owner is twin.two.proj.owner is twin.one.proj
    assert twin.one.proj is not model.one.proj
    torch.testing.assert_close(twin.two.proj(x), model.two.proj(x))


def test_dense_layers_do_not_need_the_owner(model: nn.Module, x: Tensor) -> None:
    expected = model.zero.proj(x)
    dense = model.zero.proj.dense()
    nn.init.zeros_(model.one.proj.a.weight)
    torch.testing.assert_close(dense(x), expected)


def test_a_member_pays_for_its_own_factor_only() -> None:
    assert SharedLowRank.stored_bits(6, 8, bits=16, rank=3) == 6 * 3 * 16 + 8
    both = LowRank.stored_bits(6, 8, bits=16, rank=3)
    assert both - SharedLowRank.stored_bits(6, 8, bits=16, rank=3) == 3 * 8 * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_group_cut_in_two_by_devices_still_computes(model: nn.Module, x: Tensor) -> None:
    expected = model.two.proj(x)
    model.two.proj.cuda()
    found = model.two.proj(x.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nobody": ({"shares": None}, "must name as 'shares' the layer that holds its factor"),
    "a stranger": ({"shares": "x"}, "must share with a low_rank module of the table, not None"),
    "a member": ({"shares": "two.proj"}, "must share with a low_rank module of the table"),
    "another rank": ({"rank": 2}, "must have the rank of the module it shares, 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_shared_is_refused(case: str) -> None:
    change, words = WRONG[case]
    modules = {"zero.proj": {**MEMBER, **change}, "one.proj": OWNER, "two.proj": MEMBER}
    with pytest.raises(CheckpointError, match=rf"modules\['zero.proj'\] {words}.*was edited"):
        check_modules(modules, "config.json")


def test_an_owner_of_another_width_is_refused() -> None:
    model = group(zero=(5, 9), one=(6, 8))
    words = r"modules\['zero.proj'\]: needs a factor A \[3, 9\], .* has \[3, 8\]"
    with pytest.raises(CheckpointError, match=words):
        swap_in_forms(model, {"zero.proj": MEMBER, "one.proj": OWNER})
