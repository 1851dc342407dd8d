"""Sparse weights: where each value goes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.layers.sparse import Sparse

ODD = [(3, 1), (3, 7), (4, 8), (4, 9), (6, 15), (6, 20)]  # d_out, d_in


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse(W_hat: Tensor, mask: Tensor, dtype: torch.dtype = torch.float64) -> Sparse:
    d_out, d_in = W_hat.shape
    config = ComponentConfig("sparse", {"nonzeros": int(mask.sum())})
    layer = Sparse((d_out, d_in), config, dtype=dtype)
    layer.load_state_dict(Sparse.encode(W_hat, mask))
    assert not layer.problems()
    return layer


@pytest.mark.parametrize(("d_out", "d_in"), ODD)
def test_any_width_is_read_back_exactly(d_out: int, d_in: int) -> None:
    W = random(d_out, d_in).to(torch.bfloat16)
    mask = random(d_out, d_in, seed=1) > 0
    mask[0, 0] = True
    layer = sparse(W * mask, mask, torch.bfloat16)
    assert torch.equal(layer.matrix(), W * mask)


def test_rows_may_be_empty_or_full() -> None:
    W_hat = random(3, 11)
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[1] = True
    W_hat = W_hat * mask
    layer = sparse(W_hat, mask)
    assert torch.equal(layer.matrix(), W_hat)
    assert torch.equal(layer.stored_values(), W_hat[1])


def test_a_stored_zero_keeps_its_place() -> None:
    W_hat, mask = torch.zeros(4, 9, dtype=torch.float64), random(4, 9) > 0
    assert torch.equal(sparse(W_hat, mask).matrix(), W_hat)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float32)])
def test_moving_a_bfloat16_component_rounds_nothing(move: Callable[[nn.Module], object]) -> None:
    layer = sparse(random(6, 11), random(6, 11, seed=1) > 0, torch.bfloat16)
    expected, mask = layer.matrix().float(), layer.get_buffer("mask").clone()
    move(layer)
    assert {p.dtype for p in layer.parameters()} < {torch.float16, torch.float32}
    torch.testing.assert_close(layer.matrix().float(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.get_buffer("mask"), mask)


def test_sizes_are_those_of_some_weight() -> None:
    whole = WeightConfig((6, 11), (ComponentConfig("sparse", {"nonzeros": 66}),))
    assert whole.tensors()["sparse.values"].shape == [66]
    words = r"nonzeros must be in \[1, 66\] for \[6, 11\], got 67"
    with pytest.raises(ValueError, match=words):
        WeightConfig((6, 11), (ComponentConfig("sparse", {"nonzeros": 67}),)).tensors()
