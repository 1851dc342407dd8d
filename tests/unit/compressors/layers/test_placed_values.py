"""Values at the places of a mask, and their gradients."""

import pytest
import torch

from lrc.compressors.layers import ComponentConfig
from lrc.compressors.layers.bitmask import pack_bits
from lrc.compressors.layers.placed_values import placed, places_of
from lrc.compressors.layers.sparse import Sparse

SHAPE = (5, 12)


def random_mask(seed: int = 0) -> torch.Tensor:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    return (order < 23).view(SHAPE)


@pytest.mark.parametrize("size", [1, 4])
def test_values_and_gradients_are_those_of_a_masked_scatter(size: int) -> None:
    mask, g = random_mask(), torch.Generator().manual_seed(1)
    values = torch.randn(23, size, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*SHAPE, size, generator=g, dtype=torch.float64)
    expected = weights.new_zeros(*SHAPE, size).masked_scatter(mask[:, :, None], values)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), values)
    found = placed(values, places_of(mask))
    assert torch.equal(found, expected.flatten(1))
    (own,) = torch.autograd.grad((found * weights.flatten(1)).sum(), values)
    assert torch.equal(own, gradient)


def test_places_follow_the_mask_of_a_component() -> None:
    layer = Sparse(SHAPE, ComponentConfig("sparse", {"nonzeros": 23}))
    for seed in range(3):
        mask = random_mask(seed)
        layer.load_state_dict({"values": torch.arange(1.0, 24), "mask": pack_bits(mask)})
        found = layer.entries()
        assert found.requires_grad
        with torch.no_grad():
            assert torch.equal(found, layer.entries())
        assert torch.equal(found != 0, mask)
