"""Conjugate gradients against direct solutions."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers.conjugate_gradients import conjugate_gradients


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def matrix() -> Tensor:
    X = normal(40, 12)
    return X.T @ X


def test_as_many_steps_as_unknowns_solve_one_system(matrix: Tensor) -> None:
    b, start = normal(12, seed=1), normal(12, seed=2)
    x, residual = conjugate_gradients(matrix.__matmul__, start, b - matrix @ start, steps=12)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b))
    torch.testing.assert_close(residual, b - matrix @ x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_batch_is_solved_like_its_members(matrix: Tensor, dim: int) -> None:
    B, diagonal = normal(5, 12, seed=1), matrix.diagonal()

    def turned(X: Tensor) -> Tensor:
        return X.T if dim == 0 else X

    together, _ = conjugate_gradients(
        lambda X: turned(turned(X) @ matrix),
        turned(torch.zeros_like(B)),
        turned(B),
        steps=4,
        precondition=lambda R: turned(turned(R) / diagonal),
        dim=dim,
    )
    for b, found in zip(B, turned(together), strict=True):
        alone, _ = conjugate_gradients(
            matrix.__matmul__,
            torch.zeros_like(b),
            b,
            steps=4,
            precondition=lambda r: r / diagonal,
        )
        torch.testing.assert_close(found, alone)


def test_a_masking_preconditioner_restricts_the_problem(matrix: Tensor) -> None:
    b, mask = normal(12, seed=1), normal(12, seed=3) > 0
    x, residual = conjugate_gradients(
        matrix.__matmul__, torch.zeros(12).double(), b, steps=12, precondition=mask.__mul__
    )
    torch.testing.assert_close(x[mask], torch.linalg.solve(matrix[mask][:, mask], b[mask]))
    assert not x[~mask].any()
    torch.testing.assert_close(residual, b - matrix @ x, rtol=0, atol=1e-8)


def test_a_finished_problem_stays_where_it_is(matrix: Tensor) -> None:
    zeros = torch.zeros(12).double()
    assert not conjugate_gradients(matrix.__matmul__, zeros, zeros, steps=3)[0].any()
    b = normal(12, seed=1)
    floor = 2 * b.square().sum()
    assert not conjugate_gradients(matrix.__matmul__, zeros, b, steps=3, floor=floor)[0].any()
