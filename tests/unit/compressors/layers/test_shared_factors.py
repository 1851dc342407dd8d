"""Layers that share a factor: stored once, looked up each time."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.format import check_modules
from lrc.compressors.checkpoint.quantizer import swap_in_forms
from lrc.compressors.layers import FORMS, MEMBERS
from lrc.configs.errors import CheckpointError

OWNERS: dict[str, dict[str, Any]] = {
    "low_rank": {"form": "low_rank", "rank": 3},
    "dictionary": {"form": "dictionary", "atoms": 3, "nonzeros": 2},
}
SIZE = {"low_rank": "rank", "dictionary": "atoms"}


def member_of(owner: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**owner, "form": MEMBERS[owner["form"]], "shares": "one.proj", **changes}


def test_every_form_that_can_be_shared_is_covered() -> None:
    assert OWNERS.keys() == SIZE.keys() == MEMBERS.keys()


@pytest.fixture(params=OWNERS)
def owner(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OWNERS[request.param]


def group(**linears: tuple[int, int]) -> nn.Module:
    """Make a model of linears, name -> (d_out, d_in)."""
    model = nn.Module()
    for name, (d_out, d_in) in linears.items():
        block = nn.Module()
        block.proj = nn.Linear(d_in, d_out, bias=False)
        model.add_module(name, block)
    return model


@pytest.fixture
def model(owner: dict[str, Any]) -> nn.Module:
    """Return a member, its owner after it, and another member."""
    model, member = group(zero=(5, 8), one=(6, 8), two=(7, 8)), member_of(owner)
    swap_in_forms(model, {"zero.proj": member, "one.proj": owner, "two.proj": member})
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


def test_the_shared_factor_is_stored_once(model: nn.Module) -> None:
    assert {name for name in model.state_dict() if name.endswith(".a.weight")} == {
        "one.proj.a.weight"
    }
    assert len(list(model.parameters())) == 1 + 3
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


def test_dense_layers_do_not_need_the_owner(
    model: nn.Module, x: Tensor, rounding: Callable[..., float]
) -> None:
    expected = model.zero.proj(x).detach()
    dense = model.zero.proj.dense()
    nn.init.zeros_(model.one.proj.a.weight)
    close = rounding(8 + 3, torch.float32) * float(expected.abs().max())
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=close)


OWN_BITS = {"low_rank": 6 * 3 * 16 + 8, "dictionary": 6 * (2 * 16 + 8) + 8}


def test_a_member_pays_for_its_own_part_only(owner: dict[str, Any]) -> None:
    form, sizes = owner["form"], {size: owner[size] for size in FORMS[owner["form"]].SIZES}
    alone = FORMS[MEMBERS[form]].stored_bits(6, 8, bits=16, **sizes)
    assert alone == OWN_BITS[form]
    assert FORMS[form].stored_bits(6, 8, bits=16, **sizes) - alone == 3 * 8 * 16


def test_a_member_is_no_owner(owner: dict[str, Any]) -> None:
    """A table of modules cannot say so, a model that was swapped by hand can."""
    member = member_of(owner)
    with pytest.raises(CheckpointError, match=r"shares two\.proj, which is no"):
        swap_in_forms(
            group(zero=(5, 8), one=(6, 8), two=(7, 8)),
            {"zero.proj": {**member, "shares": "two.proj"}, "one.proj": owner, "two.proj": member},
        )


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
    "a stranger": ({"shares": "x"}, "must share with a FORM module of the table, not None"),
    "a member": ({"shares": "two.proj"}, "must share with a FORM module of the table"),
    "another size": ({"rank": 2, "atoms": 2}, "must have the SIZE of the module it shares, 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_shared_is_refused(case: str, owner: dict[str, Any]) -> None:
    change, words = WRONG[case]
    member, form = member_of(owner), owner["form"]
    words = words.replace("FORM", form).replace("SIZE", SIZE[form])
    modules = {"zero.proj": {**member, **change}, "one.proj": owner, "two.proj": member}
    check_modules({**modules, "zero.proj": member}, "config.json")
    with pytest.raises(CheckpointError, match=rf"modules\['zero.proj'\] {words}.*was edited"):
        check_modules(modules, "config.json")


def test_an_owner_of_another_width_is_refused(owner: dict[str, Any]) -> None:
    model = group(zero=(5, 9), one=(6, 8))
    words = r"modules\['zero.proj'\]: needs a factor A \[3, 9\], .* has \[3, 8\]"
    with pytest.raises(CheckpointError, match=words):
        swap_in_forms(model, {"zero.proj": member_of(owner), "one.proj": owner})
