"""The low-rank layer: what it computes, what it costs, what it becomes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lrc.compressors.layers import LowRank
from lrc.compressors.planning.allocators import uniform


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(12, 4, generator=g),
        torch.randn(4, 20, generator=g),
        torch.randn(12, generator=g),
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_computes_the_product_of_its_factors(
    factors: tuple, with_bias: bool, rounding: Callable[..., float]
) -> None:
    B, A, bias = factors
    layer = LowRank.from_factors(B, A, bias if with_bias else None)
    x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1))
    expected = x @ (B @ A).T + (bias if with_bias else 0)
    close = rounding(20 + 4, torch.float32) * float(expected.abs().max())
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=close)
    torch.testing.assert_close(layer.dense()(x), expected, rtol=0, atol=close)


def test_parameters_are_two_ordinary_linears_and_the_sentinel_is_none(factors: tuple) -> None:
    layer = LowRank.from_factors(*factors)
    assert {name for name, _ in layer.named_parameters()} == {"a.weight", "b.weight", "b.bias"}
    assert [type(m) for m in layer.children()] == [nn.Linear, nn.Linear]
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (1,)


def test_counted_bits_are_those_of_its_state(factors: tuple) -> None:
    B, A, _ = factors
    layer = LowRank.from_factors(B.bfloat16(), A.bfloat16())
    held = sum(t.numel() * t.element_size() * 8 for t in layer.state_dict().values())
    assert held == LowRank.stored_bits(12, 20, bits=16, rank=4)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (3, 5)])
def test_the_rank_is_the_largest_within_the_budget(shape: tuple[int, int], keep: float) -> None:
    budget = keep * shape[0] * shape[1] * 16

    def stored(rank: int) -> int:
        return LowRank.stored_bits(*shape, bits=16, rank=rank)

    rank = uniform(stored, shape[0] * shape[1] * 16, keep, min(shape))
    assert rank == 0 or stored(rank) <= budget
    if rank < min(shape):
        assert stored(rank + 1) > budget
