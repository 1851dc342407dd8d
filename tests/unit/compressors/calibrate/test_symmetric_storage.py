"""Symmetric matrices in half the space come back unchanged."""

from math import prod

import pytest
import torch

from lrc.compressors.calibrate import symmetric_storage
from lrc.compressors.calibrate.symmetric_storage import (
    pack_symmetric,
    packed_shape,
    unpack_symmetric,
)


@pytest.mark.parametrize("block", [1, 3, 8, 1024])
@pytest.mark.parametrize("n", [*range(1, 12), 64, 65])
def test_a_matrix_comes_back_from_its_lower_triangle(
    n: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric_storage, "BLOCK", block)
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    packed = pack_symmetric(X)
    assert tuple(packed.shape) == packed_shape(n)
    assert prod(packed_shape(n)) == n * (n + 1) // 2
    assert torch.equal(unpack_symmetric(packed), X.tril() + X.tril(-1).T)


def test_places_are_those_of_lapack() -> None:
    """Its examples for the lower triangles of orders 6 and 5; 43 is row 4, column 3."""
    i, j = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    even = [[33, 43, 53], [0, 44, 54], [10, 11, 55], [20, 21, 22]]
    even += [[30, 31, 32], [40, 41, 42], [50, 51, 52]]
    assert pack_symmetric(10 * i + j).tolist() == even
    odd = [[0, 33, 43], [10, 11, 44], [20, 21, 22], [30, 31, 32], [40, 41, 42]]
    assert pack_symmetric((10 * i + j)[:5, :5]).tolist() == odd
