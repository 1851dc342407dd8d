"""Pivoted low rank: smaller than two factors of the same product, with compact indices."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.kernels import pivoted
from lrc.compressors.layers import (
    ComponentConfig,
    QuantizationArgs,
    WeightConfig,
    pivoted_low_rank,
)
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.configs.errors import CheckpointError

ENTRY = replace(pivoted.ENTRIES[0], device="cpu")
"""The entry for a GPU, which falls back to plain operations elsewhere."""


def config(kind: str, shape: tuple[int, int], rank: int) -> WeightConfig:
    return WeightConfig(shape, (ComponentConfig(kind, {"rank": rank}),))


def gaussian(d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    return B, torch.randn(rank, d_in, generator=g, dtype=torch.float64)


def test_smaller_and_less_work_than_factors_at_every_rank() -> None:
    d_out, d_in = 96, 64
    for rank in range(1, 65):
        factors, pivoted = (
            config(kind, (d_out, d_in), rank) for kind in ("low_rank", "pivoted_low_rank")
        )
        saved = factors.stored_bits(16) - pivoted.stored_bits(16)
        assert saved == 16 * rank * rank - 16 * d_out  # rank^2 numbers, for the order
        assert factors.multiply_adds() - pivoted.multiply_adds() == rank * rank


def test_order_is_as_small_as_its_numbers_allow() -> None:
    for d_out, dtype in ((32767, torch.int16), (32768, torch.int32)):
        specs = config("pivoted_low_rank", (d_out, 4), 2).tensors()
        assert specs["pivoted_low_rank.order"].dtype == dtype
        encoded = PivotedLowRank.encode(*gaussian(d_out, 4, 2))
        assert encoded["order"].dtype == dtype
        assert int(encoded["order"].max()) == d_out - 1


def test_dependent_columns_are_rejected() -> None:
    B, A = gaussian(30, 20, 8)
    B[:, 7] = 0
    with pytest.raises(
        ValueError, match=r"\[30, 8\] must have full column rank, got numerical rank 7"
    ):
        PivotedLowRank.encode(B, A)


def test_a_rank_above_the_rows_is_rejected_by_name() -> None:
    model = nn.Module()
    model.layer = nn.Linear(40, 24, bias=False)
    words = r"modules\['layer'\]: rank must be in \[1, 24\] for \[24, 40\], got 30"
    with pytest.raises(CheckpointError, match=words):
        replace_layers(model, {"layer": config("pivoted_low_rank", (24, 40), 30)})


def test_the_inverse_of_the_order_follows_loading_moving_and_copying(monkeypatch) -> None:
    first, second = (PivotedLowRank.encode(*gaussian(24, 20, rank)) for rank in (8, 8))
    second["order"] = second["order"].flip(0)
    layer = PivotedLowRank((24, 20), ComponentConfig("pivoted_low_rank", {"rank": 8}))
    layer.load_state_dict(first)
    monkeypatch.setattr(pivoted_low_rank, "select", lambda need: ENTRY)
    layer.optimize()
    assert layer.state_dict().keys() == first.keys()
    for encoded in (second, first):
        layer.load_state_dict(encoded)
        twin = copy.deepcopy(layer).half()
        for each in (layer, twin):
            assert each.inverse.dtype == torch.int32
            assert torch.equal(each.inverse[each.order.int()], torch.arange(24, dtype=torch.int32))


@pytest.mark.parametrize("n", [1, 15, 16, 40])
@pytest.mark.parametrize("rank", [8, 23, 24])
def test_any_number_of_tokens_and_pivots(n: int, rank: int, rounding) -> None:
    B, A = gaussian(24, 30, rank)
    layer = PivotedLowRank((24, 30), ComponentConfig("pivoted_low_rank", {"rank": rank})).double()
    layer.load_state_dict(PivotedLowRank.encode(B, A))
    x = torch.randn(2, n, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    y = layer(x[:, :, :])
    expected = x @ (B @ A).T
    assert y.is_contiguous()
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(y, expected, rtol=0, atol=rounding(30, condition=100) * scale)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    wanted = 2 * (x @ (B @ A).T) @ (B @ A)
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(grad, wanted, rtol=0, atol=rounding(60, condition=100) * scale)


@pytest.mark.parametrize("quantization", [None, QuantizationArgs(8)], ids=str)
@pytest.mark.parametrize("n", [1, 17])
def test_the_way_through_kernels_computes_the_same(monkeypatch, quantization, n: int) -> None:
    """As on a GPU; with the kernels themselves under TRITON_INTERPRET=1."""
    settings = ComponentConfig("pivoted_low_rank", {"rank": 8}, quantization)
    layer = PivotedLowRank((24, 30), settings)
    g = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=g)
    for name, buffer in layer.named_buffers():
        if name.endswith("_packed"):
            buffer.random_(-(2**31), 2**31 - 1, generator=g)
    layer.order.copy_(torch.randperm(24, generator=g))
    assert layer.optimize() is None
    x = torch.randn(n, 2, 30, generator=g)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(pivoted, "has_kernel", lambda p: True)
        monkeypatch.setattr(pivoted_low_rank, "select", lambda need: ENTRY)
        layer.optimize()
        assert layer.entry is ENTRY
        scale = float(expected.abs().max())
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5 * scale)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5 * scale)
        torch.compiler.reset()
