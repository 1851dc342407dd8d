"""Tensor trains: exact where they can be, and never worse after another round."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers.chain_shape import ChainShape, largest_bond, pattern_for
from lrc.compressors.layers.tensor_train import multiply_out
from lrc.compressors.solvers import chain_fit
from lrc.compressors.solvers.chain_fit import ChainProblem, orthonormalized, tensor_train_svd
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import spectrum

SHAPES = [(24, 36), (36, 24), (7, 12), (13, 24)]
DAMPING = {"damp": 1e-4, "gradient_damp": 0.1}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(d: int, seed: int) -> Moment:
    X = normal(300, d, seed=seed) @ normal(d, d, seed=seed + 50)
    return Moment.of(X.T @ X)


def problem_of(W: Tensor, chain: ChainShape, *, weighted: bool = True) -> ChainProblem:
    d_out, d_in = W.shape
    sides = (moment(d_in, 1), moment(d_out, 2)) if weighted else (None, None)
    damping = DAMPING if weighted else {}
    return ChainProblem.of(W, *sides, (chain.outputs, chain.inputs), **damping)


def energy(W: Tensor, W_hat: Tensor) -> float:
    d_out, d_in = W.shape
    H = damped(moment(d_in, 1).whole(), DAMPING["damp"])
    return weighted_error(W, W_hat, H, damped(moment(d_out, 2).whole(), DAMPING["gradient_damp"]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_full_bond_dimension_is_lossless(
    shape: tuple[int, int], cores: int, weighted: bool
) -> None:
    W, pattern = normal(*shape), pattern_for(*shape, cores)
    chain = ChainShape.of(*shape, pattern, largest_bond(*shape, pattern))
    found = problem_of(W, chain, weighted=weighted).solve(chain, 2)
    torch.testing.assert_close(multiply_out(found.cores), W, rtol=1e-10, atol=1e-10)
    assert found.relative_error < 1e-20


@pytest.mark.parametrize(("shape", "cores"), [((24, 36), 2), ((24, 36), 3), ((36, 36), 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_planted_chain_is_recovered(shape: tuple[int, int], cores: int, weighted: bool) -> None:
    chain = ChainShape.of(*shape, pattern_for(*shape, cores), 3)
    W = multiply_out([normal(*core, seed=k) for k, core in enumerate(chain.cores)])
    found = problem_of(W, chain, weighted=weighted).solve(chain, 1)
    assert [tuple(core.shape) for core in found.cores] == chain.cores
    torch.testing.assert_close(multiply_out(found.cores), W, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("cores", [3, 4])
def test_the_start_is_within_the_bound_of_the_discarded_singular_values(cores: int) -> None:
    W = normal(24, 36)
    chain = ChainShape.of(24, 36, pattern_for(24, 36, cores), 4)
    count = len(chain.outputs)
    order = [axis for k in range(count) for axis in (k, count + k)]
    T = W.view(*chain.outputs, *chain.inputs).permute(order)
    discarded = []
    rows = 1
    for k, bond in enumerate(chain.bonds[1:-1]):
        rows *= chain.outputs[k] * chain.inputs[k]
        values = torch.linalg.svdvals(T.reshape(rows, -1))
        discarded.append(float(values[bond:].square().sum()))
    error = float((W - multiply_out(tensor_train_svd(W, chain))).square().sum())
    assert max(discarded) <= error <= sum(discarded)  # of one unfolding, and of all


def test_two_cores_are_the_sum_of_kronecker_products_of_the_rearranged_svd() -> None:
    """Van Loan and Pitsianis 1993, for a metric of all ones."""
    W, chain = normal(24, 36), ChainShape.of(24, 36, "6x4,4x9", 3)
    rearranged = W.view(6, 4, 4, 9).transpose(1, 2).reshape(24, 36)
    U, S, Vh = torch.linalg.svd(rearranged)
    expected = sum(
        S[r] * torch.kron(U[:, r].reshape(6, 4), Vh[r].reshape(4, 9).contiguous()) for r in range(3)
    )
    found = problem_of(W, chain, weighted=False).solve(chain, 2)
    torch.testing.assert_close(multiply_out(found.cores), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", ["24x1,1x36", "1x24,36x1"])
def test_with_one_side_in_every_core_it_is_the_method_kfac(pattern: str) -> None:
    """The chain is then a product of two factors, with the metric as its separable part."""
    W = normal(24, 36)
    chain = ChainShape.of(24, 36, pattern, 5)
    found = problem_of(W, chain).solve(chain, 2)
    best = spectrum(W, moment(36, 1), moment(24, 2), **DAMPING).truncate(5)
    torch.testing.assert_close(multiply_out(found.cores), best.B @ best.A, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_no_round_increases_the_error(
    shape: tuple[int, int], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_fit, "CONVERGED", 0.0)
    W, pattern = normal(*shape), pattern_for(*shape, cores)
    chain = ChainShape.of(*shape, pattern, max(largest_bond(*shape, pattern) // 3, 1))
    problem = problem_of(W, chain)
    found = [problem.solve(chain, rounds) for rounds in range(6)]
    errors = [energy(W, multiply_out(each.cores)) for each in found]
    for error, each in zip(errors, found, strict=True):
        assert each.energy == pytest.approx(error, rel=1e-8)
        assert each.relative_error == pytest.approx(error / energy(W, 0 * W), rel=1e-8)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0]


def test_whitening_by_the_separable_part_helps_the_start() -> None:
    """For a separable metric the start is as good as the search."""
    W, chain = normal(24, 36), ChainShape.of(24, 36, "6x4,4x9", 6)
    sides = [
        torch.kron(moment(a, seed).whole(), moment(b, seed + 1).whole())
        for a, b, seed in ((4, 9, 3), (6, 4, 5))
    ]
    H, G = map(Moment.of, sides)
    problem = ChainProblem.of(W, H, G, (chain.outputs, chain.inputs))
    start, found = problem.solve(chain, 0), problem.solve(chain, 3)
    assert found.energy == pytest.approx(start.energy, rel=1e-6)
    plain = multiply_out(tensor_train_svd(W, chain))
    assert start.energy < 0.9 * weighted_error(W, plain, *sides)


def test_the_diagonal_of_gradients_counts_like_the_matrix_with_zeros() -> None:
    W, chain = normal(24, 36), ChainShape.of(24, 36, "6x4,4x9", 6)
    weights = normal(24, seed=7).square() + 0.1
    full = Moment.of(weights.diag())
    known = Moment(weights, image=W.T @ (weights[:, None] * W))
    results = [
        ChainProblem.of(W, moment(36, 1), G, (chain.outputs, chain.inputs), damp=1e-4).solve(
            chain, 2
        )
        for G in (full, known)
    ]
    first, second = (multiply_out(each.cores) for each in results)
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8)


def test_a_weight_of_zeros_is_a_chain_of_zeros() -> None:
    W, chain = torch.zeros(24, 36), ChainShape.of(24, 36, "6x4,4x9", 6)
    found = problem_of(W, chain).solve(chain, 2)
    assert (found.energy, found.relative_error) == (0, 0)
    assert not multiply_out(found.cores).any()


def test_orthonormalization_does_not_fail_if_its_smallest_shift_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chain_fit, "SHIFT", 0.0)
    C = normal(40, 5) @ normal(5, 20, seed=1)
    assert int(torch.linalg.cholesky_ex(C.T @ C).info) > 0
    Q, R = orthonormalized(C)
    torch.testing.assert_close(Q @ R, C, rtol=0, atol=1e-12 * float(C.norm()))
    lengths = torch.linalg.svdvals(Q)  # of the rank 5, orthonormal columns; the rest are rounding
    torch.testing.assert_close(lengths[:5], torch.ones(5, dtype=Q.dtype), rtol=1e-9, atol=0)
    assert float(lengths[5:].max()) < 1e-2
