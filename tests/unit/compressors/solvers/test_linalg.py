"""Second moments and whitening factors."""

import pytest
import torch

from lrc.compressors.solvers import linalg
from lrc.compressors.solvers.linalg import (
    MAX_DAMP,
    add_gram_,
    damped,
    descending_eigh,
    inverse_of_factored_,
    invert_triangular_,
    weighted_error,
    whitening_factor,
)


def test_whitening_factor_reproduces_the_damped_matrix() -> None:
    X = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = X.T @ X
    L, fallback = whitening_factor(H, 1e-3)
    assert fallback is None
    torch.testing.assert_close(L @ L.T, damped(H, 1e-3), rtol=1e-12, atol=1e-12)
    assert torch.equal(L, L.tril())


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    H = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.equal(damped(H, 0.5), torch.diag(torch.tensor([2.0, 4.0])))


def test_an_indefinite_matrix_is_whitened_by_eigenvectors() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64))  # beyond any damping
    L, fallback = whitening_factor(H, 0.0)
    assert fallback == "Cholesky failed; whitened by eigenvectors"
    torch.testing.assert_close((L @ L.T).diagonal()[:2], H.diagonal()[:2])
    assert torch.linalg.matrix_rank(L) == 3


@pytest.mark.parametrize(
    ("damp", "least", "used"),
    [
        (0.0, -0.5e-3, 1e-3),  # 0, 1e-10, ..., 1e-4, 1e-3
        (5e-3, -1e-2, 5e-2),
        (5e-3, -7e-2, 1e-1),  # 5e-2 is not enough, and the last step is shorter
        (2e-2, -7e-2, 1e-1),
        (0.5, 0.0, 0.5),  # more than is ever tried, if requested
    ],
)
def test_damping_is_raised_tenfold_until_it_suffices(
    damp: float, least: float, used: float
) -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, least], dtype=torch.float64))
    H = H / H.diagonal().mean()
    L, fallback = whitening_factor(H, damp)
    torch.testing.assert_close(L @ L.T, damped(H, used))
    expected = None if used == damp else f"damping raised from {damp:g} to {used:g}"
    assert fallback == expected


def test_more_than_the_largest_damping_is_not_tried() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.09 * 4], dtype=torch.float64))
    assert MAX_DAMP == 1e-1
    for damp in (0.0, 5e-3, 1e-2, 1e-1):
        assert whitening_factor(H, damp)[1] == "Cholesky failed; whitened by eigenvectors"


def test_eigenvalues_descend_and_are_not_negative() -> None:
    S = torch.diag(torch.tensor([2.0, -1e-18, 5.0], dtype=torch.float64))
    energies, vectors = descending_eigh(S)
    assert energies.tolist() == [5, 2, 0]
    torch.testing.assert_close(vectors @ torch.diag(energies) @ vectors.T, S.clamp_min(0))


def test_weighted_error_is_the_output_error_on_the_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(30, 6, generator=g, dtype=torch.float64)
    W, W_hat = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    outputs = float((X @ (W - W_hat).T).square().sum())
    assert weighted_error(W, W_hat, X.T @ X) == pytest.approx(outputs, rel=1e-12)


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_damping_leaves_the_matrix_as_it_was(damp: float) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for H in (x.T @ x, x[:, :3].T @ x[:, :3]):  # the former only has a factor if it is damped
        before = H.clone()
        L, _ = whitening_factor(H, damp)
        assert torch.equal(H, before)
        torch.testing.assert_close(L @ L.T, damped(H, damp), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 16, 64])
def test_blocks_invert_a_triangle_and_use_one_triangle_of_a_moment(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "TRIANGULAR_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(90, 40, generator=generator, dtype=torch.float64)
    W, H = X[:20], X.T @ X
    L = torch.linalg.cholesky(H)
    inverse = L.clone()
    invert_triangular_(inverse)
    torch.testing.assert_close(inverse, torch.linalg.inv(L).tril(), rtol=1e-10, atol=1e-12)
    assert torch.equal(inverse, inverse.tril())
    whole = inverse_of_factored_(L.clone(), torch.float64)
    torch.testing.assert_close(whole @ H, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-9)
    before = H.clone()
    assert weighted_error(W, 0 * W, H) == pytest.approx(float((W @ H * W).sum()), rel=1e-12)
    assert torch.equal(H, before)


def test_gram_matrix_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches, with a last block that is smaller."""
    monkeypatch.setattr(linalg, "GRAM_BLOCK", 5)
    x = torch.randn(40, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(13, 13, dtype=torch.float64)
    for part in x.split(25):
        add_gram_(total, part)
    torch.testing.assert_close(total, x.T @ x, rtol=1e-13, atol=1e-13)
