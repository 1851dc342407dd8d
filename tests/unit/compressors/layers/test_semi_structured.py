"""The layout of n:8, read by a loop over groups, as a kernel reads it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers import COMPONENTS, ComponentConfig, CompressedLinear, WeightConfig
from lrc.compressors.layers.compressed_linear import sentinel

KIND = "semi_structured"
SHAPES = [(1, 8), (1, 104), (17, 8), (17, 40), (33, 264)]  # d_out, d_in


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pruned(shape: tuple[int, int], n: int) -> tuple[Tensor, Tensor]:
    """Return a weight with n entries in every group of eight at random places, and its mask."""
    where = random(*shape, seed=1).unflatten(1, (-1, 8)).topk(n, dim=2).indices
    mask = torch.zeros(shape[0], shape[1] // 8, 8, dtype=torch.bool).scatter_(2, where, True)
    return random(*shape) * mask.flatten(1), mask.flatten(1)


def read_by_groups(values: Tensor, mask: Tensor) -> Tensor:
    """Return the matrix: value number k of a group belongs to the k-th set bit of its byte."""
    d_out, groups, _ = values.shape
    W = torch.zeros(d_out, 8 * groups, dtype=values.dtype)
    for i in range(d_out):
        for g in range(groups):
            columns = [8 * g + j for j in range(8) if int(mask[i, g]) >> j & 1]
            W[i, columns] = values[i, g]
    return W


def layer_of(shape: tuple[int, int], n: int, dtype: torch.dtype) -> CompressedLinear:
    config = WeightConfig(shape, (ComponentConfig(KIND, {"n": n}),))
    layer = CompressedLinear(config, dtype=dtype)
    W, mask = pruned(shape, n)
    encoded = COMPONENTS[KIND].encode(W_hat=W, mask=mask)
    layer.load_state_dict(
        {"weight": sentinel(), **{f"{KIND}.{leaf}": tensor for leaf, tensor in encoded.items()}}
    )
    assert layer.problems() == []
    return layer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", range(1, 9))
def test_values_are_in_the_order_of_the_bits_of_their_group(shape: tuple[int, int], n: int) -> None:
    W, mask = pruned(shape, n)
    encoded = COMPONENTS[KIND].encode(W_hat=W, mask=mask)
    assert encoded["values"].shape == (shape[0], shape[1] // 8, n)
    assert encoded["values"].is_contiguous()
    assert torch.equal(read_by_groups(encoded["values"], encoded["mask"]), W)
    (component,) = layer_of(shape, n, torch.float64).components
    assert torch.equal(component.matrix(), W)
    # A weight that is stored column by column gives the same.
    turned = COMPONENTS[KIND].encode(W_hat=W.T.contiguous().T, mask=mask.T.contiguous().T)
    assert all(torch.equal(encoded[leaf], turned[leaf]) for leaf in encoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_within_rounding_of_float64(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, rounding: Callable[..., float]
) -> None:
    layer = layer_of(shape, 5, dtype)
    x = random(tokens, shape[1], seed=3).to(dtype)
    (component,) = layer.components
    W = component.matrix().double()
    expected, scale = x.double() @ W.T, x.double().abs() @ W.abs().T
    error = (layer(x).double() - expected).abs()
    assert bool((error <= rounding(shape[1], dtype) * scale + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("bits", [(3,), (0,)])
def test_unequal_groups_cannot_be_stored(bits: tuple[int, ...]) -> None:
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :3] = mask[:, 8:11] = True
    mask[1, list(bits)] ^= True
    with pytest.raises(ValueError, match=r"must have equally many entries, got [23] to [34]"):
        COMPONENTS[KIND].encode(W_hat=torch.ones(2, 16), mask=mask)
    with pytest.raises(ValueError, match="got 0 to 0"):
        COMPONENTS[KIND].encode(W_hat=torch.ones(2, 16), mask=torch.zeros_like(mask))
