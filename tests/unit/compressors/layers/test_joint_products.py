"""Layers that receive the same input are one launch, where there is a kernel for it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.kernels import Entry, optimize
from lrc.compressors.layers import Component, ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.layers import packed_weight as packed_weight_module
from lrc.compressors.layers.packing import dequantize, unpack_integers
from lrc.compressors.layers.siblings import share_inputs

D, WIDTHS = 64, {"q_proj": 24, "k_proj": 8, "v_proj": 16}


class Attention(nn.Module):
    """Not one, but it passes its inputs on like one."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in WIDTHS.items():
            self.add_module(name, nn.Linear(D, width, bias=False))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], dim=-1)


def make(*schemes: str) -> Any:
    """Return layers of random integers."""
    model = Attention()
    configs = {}
    for (name, width), scheme in zip(WIDTHS.items(), schemes, strict=True):
        args = QuantizationArgs.parse(scheme)
        configs[name] = WeightConfig((width, D), (ComponentConfig("dense", {}, quantization=args),))
    replace_layers(model, configs)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("packed"):
            buffer.random_(-(2**31), 2**31 - 1, generator=generator)
    return model.eval().requires_grad_(False)


class Kernel:
    """An entry of the table that counts its launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[int] = []
        self.error: Exception | None = None
        entry = Entry(
            "kernel", "packed_linear", "cpu", range(2, 9), self.run, together=self.together
        )
        monkeypatch.setattr(packed_weight_module, "select", lambda _: entry)

    def run(self, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Any:
        self.launches.append(1)
        return product(x, packed, scale, bits)

    def together(self, x: Tensor, matrices: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.launches.append(len(matrices))
        return [product(x, packed, scale, bits) for packed, scale, _, bits in matrices]

    def take(self) -> list[int]:
        found, self.launches = self.launches, []
        return found


def product(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    return x @ dequantize(unpack_integers(packed, bits, D), scale, None).T


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(kernel: Kernel) -> Any:
    model = make("int4-g32", "int4-g32", "int4-g32")
    optimize(model)
    (group,) = share_inputs(model)
    assert len(group.members) == 3
    return model


def test_one_launch_gives_the_same(
    model: Any, kernel: Kernel, x: Tensor, rounding: Callable[..., float]
) -> None:
    expected = make("int4-g32", "int4-g32", "int4-g32")(x)
    for given in (x, x[0], x[0, :1]):
        wanted = expected if given is x else expected[0, : len(given)]
        atol = rounding(D, torch.float32) * float(expected.abs().max())
        torch.testing.assert_close(model(given), wanted, rtol=0, atol=atol)
        assert kernel.take() == [1, 1, 1]  # autograd is on
        with torch.no_grad():
            torch.testing.assert_close(model(given), wanted, rtol=0, atol=atol)
        assert kernel.take() == [3]


def test_only_equal_schemes_share_a_launch(kernel: Kernel, x: Tensor) -> None:
    model = make("int4-g32", "int3-g32", "int4-g32")
    optimize(model)
    (group,) = share_inputs(model)
    assert [member.d_out for member in group.members] == [24, 16]
    assert share_inputs(make("int4-g32", "int4", "int8")) == []
    with torch.no_grad():
        model(x)
    assert kernel.take() == [2, 1]


@pytest.mark.parametrize("move", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_group_of_their_own(
    model: Any, kernel: Kernel, x: Tensor, move: Callable[[Any], Any]
) -> None:
    moved = move(model)
    with torch.no_grad():
        before = moved(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(moved(x), before)
    assert kernel.take() == [3, 3]


def test_scales_that_learn_multiply_alone_and_are_seen(
    model: Any, kernel: Kernel, x: Tensor
) -> None:
    model.k_proj.dense.weight_scale.requires_grad_(True)
    model(x).sum().backward()
    assert model.k_proj.dense.weight_scale.grad is not None
    kernel.take()
    with torch.no_grad():
        before = model(x)
        model.k_proj.dense.weight_scale.mul_(2)
        after = model(x)
    assert kernel.take() == [3, 3]
    torch.testing.assert_close(after[..., 24:32], 2 * before[..., 24:32])


def test_an_adapter_or_hook_changes_only_its_layer(model: Any, kernel: Kernel, x: Tensor) -> None:
    with torch.no_grad():
        before = model(x)
        model.k_proj.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
        after = model(x)
    torch.testing.assert_close(after[..., 24:32], 2 * before[..., 24:32])
    assert torch.equal(after[..., :24], before[..., :24])


def test_other_inputs_dissolve_the_group(kernel: Kernel, x: Tensor) -> None:
    model = make("int8", "int8", "int8")
    optimize(model)
    (group,) = share_inputs(model)
    with torch.no_grad():
        expected = torch.cat([model.q_proj(x), model.k_proj(x.flip(0))], dim=-1)
        kernel.take()
        found = [model(x, x.flip(0)) for _ in range(2)]
    assert all(torch.equal(y[..., :32], expected) for y in found)
    assert group._dissolved
    assert kernel.take()[-3:] == [1, 1, 1]


def test_a_kernel_that_fails_leaves_every_layer_its_own(
    model: Any, kernel: Kernel, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.error = RuntimeError("too many registers")
    with torch.no_grad():
        model(x)
        model(x)
    assert kernel.take() == [1] * 6
    (record,) = caplog.records
    assert "no product of several matrices (RuntimeError: too many" in record.getMessage()


def test_without_a_kernel_for_several_matrices_nothing_changes(x: Tensor) -> None:
    model = make("int4-g32", "int4-g32", "int4-g32")
    expected = model(x)
    assert len(share_inputs(model)) == 1
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert all(c.siblings is not None for c in model.modules() if isinstance(c, Component))


def test_an_input_of_the_wrong_width_is_an_error(model: Any) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, D // 2))
