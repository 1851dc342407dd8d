"""Infinities and NaN are found wherever they are."""

import pytest
import torch

from lrc.compressors.io.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_found_anywhere(dtype: torch.dtype) -> None:
    x = torch.randn(40, 257, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(x)
    assert all_finite(x.T[3:7])
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in [(0, 0), (20, 130), (39, 256)]:
            damaged = x.clone()
            damaged[place] = value
            assert not all_finite(damaged)
            assert not all_finite(damaged.T)


def test_an_empty_tensor_is_finite() -> None:
    assert all_finite(torch.zeros(0, 3))
