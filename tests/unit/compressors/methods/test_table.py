"""Every method against the formula of its own paper."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.methods.table import METHODS, LowRankMethod
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.compressors.solvers.shared_factors import shared_spectrum, split

SHAPES = [(24, 40), (40, 24), (30, 30)]
RANK = 7
LOW_RANK = [name for name, method in METHODS.items() if isinstance(method, LowRankMethod)]
N_TOKENS = 300
VALUES = {"alpha": 0.5, "damp": 1e-6, "gradient_damp": 0.1}


def low_rank(name: str) -> LowRankMethod:
    method = METHODS[name]
    assert isinstance(method, LowRankMethod)
    return method


def options_of(name: str) -> dict[str, float]:
    return {option: VALUES[option] for option in METHODS[name].options}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(d: int, *, seed: int = 1) -> Tensor:
    """Draw inputs with mixed channels, unequal scales and a mean."""
    X = normal(N_TOKENS, d, seed=seed) @ normal(d, d, seed=seed + 50)
    return (X + normal(d, seed=seed + 90) * 5) * torch.logspace(-1, 1, d, dtype=torch.float64)


def known(X: Tensor, gradients: Tensor) -> Statistics:
    return Statistics(
        len(X),
        inputs=Moment.of(X.T @ X),
        gradients=Moment.of(gradients.T @ gradients),
        input_mean=X.sum(0),
        input_magnitude=X.abs().sum(0),
        row_fisher=normal(gradients.shape[1], seed=9).square() + 0.1,
    )


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Statistics]:
    W, X = normal(*shape, seed=0), tokens(shape[1])
    return W, X, known(X, tokens(shape[0], seed=2))


def cut_svd(M: Tensor, rank: int = RANK) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def product_of(name: str, W: Tensor, statistics: Statistics, **options: float) -> Tensor:
    options = options_of(name) | options
    factors = low_rank(name).solve(W, statistics, **options).truncate(RANK)
    return factors.B @ factors.A


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    W, _, statistics = case(shape)
    torch.testing.assert_close(product_of("svd", W, statistics), cut_svd(W), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_is_the_svd_of_the_row_weighted_weight(shape: tuple[int, int]) -> None:
    W, _, statistics = case(shape)
    D = statistics.row_fisher.sqrt()[:, None]
    expected = cut_svd(D * W) / D
    torch.testing.assert_close(product_of("fwsvd", W, statistics), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_asvd_is_the_svd_of_the_column_scaled_weight(shape: tuple[int, int], alpha: float) -> None:
    W, X, statistics = case(shape)
    S = X.abs().mean(0) ** alpha
    expected = cut_svd(W * S) / S
    actual = product_of("asvd", W, statistics, alpha=alpha)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_its_second_version_and_output_pca_give_the_same_weight(
    shape: tuple[int, int],
) -> None:
    W, X, statistics = case(shape)
    H = X.T @ X
    actual = product_of("svd-llm", W, statistics, damp=0.0)

    L = torch.linalg.cholesky(H)  # SVD-LLM, arXiv:2403.07378
    cholesky = torch.linalg.solve_triangular(L.T, cut_svd(W @ L).T, upper=True).T
    Us, Ss, _ = torch.linalg.svd(H)  # SVD-LLM V2, arXiv:2503.12340: two SVDs
    two_svds = cut_svd(W @ Us * Ss.sqrt()) / Ss.sqrt() @ Us.T
    _, vectors = torch.linalg.eigh(W @ H @ W.T)  # Swift-SVD, arXiv:2604.01609: PCA of the outputs
    U = vectors[:, -RANK:]
    for expected in (cholesky, two_svds, U @ U.T @ W):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
        size = weighted_error(W, torch.zeros_like(W), H)
        assert weighted_error(actual, expected, H) < 1e-16 * size


@pytest.mark.parametrize("shape", SHAPES)
def test_lord_is_atomic_feature_mimicking_and_keeps_the_mean_output(
    shape: tuple[int, int],
) -> None:
    W, X, statistics = case(shape)
    Y = X @ W.T
    covariance = Y.T @ Y / N_TOKENS - torch.outer(Y.mean(0), Y.mean(0))
    U = torch.linalg.eigh(covariance).eigenvectors[:, -RANK:]
    curve = low_rank("lord").solve(W, statistics, damp=0.0)
    factors = curve.truncate(RANK)
    W_hat = factors.B @ factors.A
    bias = (W - W_hat) @ curve.mean
    torch.testing.assert_close(W_hat, U @ U.T @ W, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(bias, Y.mean(0) - U @ (U.T @ Y.mean(0)), rtol=1e-7, atol=1e-5)
    mean_error = (X @ W_hat.T + bias - Y).mean(0)
    assert mean_error.abs().max() < 1e-10 * Y.abs().max()
    without_bias = (X @ product_of("svd-llm", W, statistics).T - Y).square().sum()
    assert (X @ W_hat.T + bias - Y).square().sum() < without_bias


def test_lord_needs_only_the_outputs() -> None:
    W, X, statistics = case((24, 40))
    Y = X @ W.T
    seen = Statistics(len(X), inputs=Moment(X.square().sum(0), image=Y.T @ Y), input_mean=X.sum(0))
    a, b = (low_rank("lord").solve(W, known, damp=1e-6) for known in (seen, statistics))
    one, other = (curve.truncate(RANK) for curve in (a, b))
    torch.testing.assert_close(one.B @ one.A, other.B @ other.A, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(
        (W - one.B @ one.A) @ a.mean, (W - other.B @ other.A) @ b.mean, rtol=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_kfac_is_the_svd_between_the_root_of_g_and_the_factor_of_h(shape: tuple[int, int]) -> None:
    W, _, statistics = case(shape)
    G, H = damped(statistics.gradients.whole(), 0.1), damped(statistics.inputs.whole(), 1e-6)
    e, Q = torch.linalg.eigh(G)
    root, L = Q * e.sqrt() @ Q.T, torch.linalg.cholesky(H)
    un_rooted = torch.linalg.solve(root, cut_svd(root @ W @ L))
    expected = torch.linalg.solve_triangular(L.T, un_rooted.T, upper=True).T
    actual = product_of("kfac", W, statistics)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_predicted_nats_are_exact_where_inputs_and_gradients_are_independent() -> None:
    """Every input meets every gradient; token losses are quadratic with curvature g g^T."""
    W, xs, gs = normal(6, 9, seed=0), tokens(9)[:40], tokens(6, seed=2)[:30]
    X, gradients = xs.repeat_interleave(30, 0), gs.repeat(40, 1)  # 1200 tokens
    statistics = Statistics(
        len(X), inputs=Moment.of(X.T @ X), gradients=Moment.of(gradients.T @ gradients)
    )
    method = low_rank("kfac")
    s = method.solve(W, statistics, damp=0.0, gradient_damp=0.0)
    factors = s.truncate(3)
    change = X @ (factors.B @ factors.A - W).T  # [n_tokens, d_out]
    losses = 0.5 * (gradients * change).sum(1).square()  # what each token's loss grows by
    predicted = method.predicted_increase(s.tail_energy(3), len(X))
    assert predicted == pytest.approx(float(losses.mean()), rel=1e-8)


def test_only_two_sided_methods_predict_losses() -> None:
    able = {name for name, m in METHODS.items() if m.predicted_increase(1.0, 10) is not None}
    assert able == {"kfac", "sparse", "compot", "rocket", "dictionary", "tensor-train", "mixed"}


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("shape", SHAPES)
def test_energies_without_vectors_are_those_of_the_solution(
    name: str, shape: tuple[int, int]
) -> None:
    W, _, statistics = case(shape)
    method = low_rank(name)
    energies = method.solve(W, statistics, **options_of(name)).energies
    alone = method.energies(W, statistics, **options_of(name))
    torch.testing.assert_close(alone, energies, rtol=1e-10, atol=1e-13 * float(energies[0]))


@pytest.mark.parametrize("name", LOW_RANK)
def test_every_row_is_documented_and_takes_only_its_options(name: str) -> None:
    method, options = low_rank(name), options_of(name)
    assert (method.metric.__doc__ or "").partition("\n")[0].endswith(".")
    assert method.source
    W, _, statistics = case((24, 40))
    with pytest.raises(TypeError):
        method.solve(W, statistics, **options, no_such_option=1.0)
    for option in options:
        with pytest.raises(TypeError):
            method.solve(W, statistics, **{k: v for k, v in options.items() if k != option})
    if method.statistics:
        with pytest.raises(ValueError, match=f"lack {sorted(method.statistics)[0]}"):
            method.solve(W, Statistics(), **options)


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_without_input_or_gradient_give_finite_weights(
    name: str, shape: tuple[int, int]
) -> None:
    W, X, gradients = normal(*shape, seed=0), tokens(shape[1]), tokens(shape[0], seed=2)
    X[:, 3] = 0
    gradients[:, 5] = 0
    statistics = known(X, gradients)
    statistics.row_fisher[5] = 0
    factors = low_rank(name).solve(W, statistics, **options_of(name)).truncate(RANK)
    assert torch.isfinite(factors.B @ factors.A).all()


@pytest.mark.parametrize("shape", [(24, 40), (10, 40)])
def test_basis_sharing_is_the_svd_of_the_stacked_whitened_weights(shape: tuple[int, int]) -> None:
    weights = [normal(*shape, seed=s) for s in range(3)]
    X = torch.cat([tokens(shape[1], seed=s) for s in range(3)])
    L = torch.linalg.cholesky(X.T @ X)
    stacked = torch.linalg.solve_triangular(
        L.T, cut_svd(torch.cat(weights) @ L).T, upper=True
    ).T  # fmt: skip
    factors = shared_spectrum(weights, Moment.of(X.T @ X)).truncate(RANK)
    parts = split(factors.B, 3)
    assert [p.shape for p in parts] == [(shape[0], RANK)] * 3
    for part, expected in zip(parts, stacked.split(shape[0]), strict=True):
        torch.testing.assert_close(part @ factors.A, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_basis_sharing_of_one_layer_is_svd_llm(shape: tuple[int, int]) -> None:
    W, _, statistics = case(shape)
    alone = shared_spectrum([W], statistics.inputs, damp=1e-6).truncate(RANK)
    expected = product_of("svd-llm", W, statistics)
    torch.testing.assert_close(alone.B @ alone.A, expected, rtol=1e-10, atol=1e-10)


def test_weights_of_several_shapes_cannot_share_a_basis() -> None:
    with pytest.raises(ValueError, match="one shape"):
        shared_spectrum([torch.zeros(3, 4), torch.zeros(5, 4)], Moment.of(torch.eye(4)))
