"""Bases of the residual stream: principal axes, and alignment from one block to the next."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrc.compressors.slicing.stream_bases import align_basis, principal_axes

WIDTH = 32


def test_principal_axes_are_those_that_were_planted(random_rotation):
    planted, energies = random_rotation(3), torch.arange(32, 0, -1, dtype=torch.float64)
    moment = planted @ torch.diag(energies) @ planted.T
    Q, found = principal_axes(moment)
    torch.testing.assert_close((Q.T @ planted).abs(), torch.eye(32, dtype=torch.float64))
    torch.testing.assert_close(found, energies, rtol=1e-10, atol=0)
    peaks = Q.gather(0, Q.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())


def test_principal_axes_of_a_moment_of_low_rank_are_complete():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    Q, _ = principal_axes(x.T @ x)
    assert Q.dtype == torch.float64
    eye = torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(Q.T @ Q, eye, rtol=0, atol=1e-12)
    kept = x.double() @ Q[:, :3]
    torch.testing.assert_close(kept @ Q[:, :3].T, x.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [32, 28, 20, 16, 9])
def test_aligned_bases_have_a_symmetric_shortcut_of_low_rank(
    random_rotation: Callable[[int], Tensor], k: int
) -> None:
    before, after = random_rotation(0)[:, :k], random_rotation(1)[:, :k]
    rank = min(k, WIDTH - k)
    found, F = align_basis(before, after, rank)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found @ found.T, after @ after.T, **exact)  # the same span
    assert F.shape == (k, rank)
    torch.testing.assert_close(before.T @ found, torch.eye(k).double() - F @ F.T, **exact)
