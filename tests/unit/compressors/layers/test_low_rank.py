"""The low-rank layer: what it computes and stores, and what it becomes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.layers import ComponentConfig, CompressedLinear, WeightConfig, sentinel
from lrc.compressors.layers.low_rank import LowRank

CONFIG = WeightConfig((12, 20), (ComponentConfig("low_rank", {"rank": 4}),))
Factors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def factors() -> Factors:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(12, 4, generator=g),
        torch.randn(4, 20, generator=g),
        torch.randn(12, generator=g),
    )


def layer_of(B: Tensor, A: Tensor, bias: Tensor | None = None) -> CompressedLinear:
    layer = CompressedLinear(CONFIG, bias=bias is not None, dtype=B.dtype)
    state = {f"low_rank.{leaf}": tensor for leaf, tensor in LowRank.encode(B, A).items()}
    state |= {"weight": sentinel()} | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("with_bias", [False, True])
def test_computes_the_product_of_its_factors(
    factors: Factors, with_bias: bool, rounding: Callable[..., float]
) -> None:
    B, A, bias = factors
    layer = layer_of(B, A, bias if with_bias else None)
    x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1))
    expected = x @ (B @ A).T + (bias if with_bias else 0)
    close = rounding(20 + 4, torch.float32) * float(expected.abs().max())
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=close)
    torch.testing.assert_close(layer.to_dense()(x), expected, rtol=0, atol=close)


def test_parameters_are_two_ordinary_linears_and_the_sentinel_is_none(factors: Factors) -> None:
    layer = layer_of(*factors)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"low_rank.a.weight", "low_rank.b.weight", "bias"}
    assert [type(m) for m in layer.low_rank.children()] == [nn.Linear, nn.Linear]
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (1,)


def test_counted_bits_are_those_of_its_state(factors: Factors) -> None:
    B, A, _ = factors
    layer = layer_of(B.bfloat16(), A.bfloat16())
    stored = sum(t.numel() * t.element_size() * 8 for t in layer.state_dict().values())
    assert stored == CONFIG.stored_bits(16) == 16 * 4 * (12 + 20) + 8
