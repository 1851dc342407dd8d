"""Symmetric matrices in half the space come back unchanged."""

import pytest
import torch

from lrc.compressors.calibrate import symmetric_storage
from lrc.compressors.calibrate.symmetric_storage import (
    pack_symmetric,
    packed_numbers,
    unpack_symmetric,
)


@pytest.mark.parametrize("block", [1, 3, 8, 1024])
@pytest.mark.parametrize("n", [*range(1, 12), 64, 65])
def test_a_matrix_comes_back_from_its_lower_triangle(
    n: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric_storage, "BLOCK", block)
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    given = X.clone()
    packed = pack_symmetric(X)
    assert sum(part.numel() for part in packed) == packed_numbers(n)
    assert all(part.is_contiguous() for part in packed)
    assert torch.equal(unpack_symmetric(*packed), X.tril() + X.tril(-1).T)
    assert torch.equal(X, given)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_whole_matrix_stays_as_it_is(n: int) -> None:
    """As in the journal of a run that another version has begun."""
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    assert torch.equal(unpack_symmetric(X, X[:0]), X)


def test_the_numbers_are_those_of_the_lower_triangle() -> None:
    """In the places of LAPACK's examples of orders 6 and 5; 43 is row 4, column 3."""
    i, j = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    rectangle, column = pack_symmetric(10 * i + j)
    even = [[0, 44, 54], [10, 11, 55], [20, 21, 22], [30, 31, 32], [40, 41, 42], [50, 51, 52]]
    assert rectangle.tolist() == even
    assert column.tolist() == [33, 43, 53]
    rectangle, column = pack_symmetric((10 * i + j)[:5, :5])
    odd = [[0, 33, 43], [10, 11, 44], [20, 21, 22], [30, 31, 32], [40, 41, 42]]
    assert rectangle.tolist() == odd
    assert not column.numel()
