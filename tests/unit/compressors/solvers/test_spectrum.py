"""The solver of the SVD family: identities first, then an independent implementation."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import Factors, energies_only, spectrum

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 16), (16, 1)]


def of(H: Tensor | None) -> Moment | None:
    return None if H is None else Moment.of(H)


def image_of(H: Tensor, W: Tensor) -> Moment:
    """Give the same moment as a wide side accumulates it."""
    return Moment(H.diagonal(), image=W @ H @ W.T)


def product(factors: Factors) -> Tensor:
    return factors.B @ factors.A


def correlated(d: int, *, tokens: int = 200, seed: int = 1) -> Tensor:
    """Second moment of tokens whose channels are mixed and differ in scale by 100."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, d, generator=g, dtype=torch.float64)
    X = X @ torch.randn(d, d, generator=g, dtype=torch.float64)
    X = X * torch.logspace(-1, 1, d, dtype=torch.float64)
    return X.T @ X


def weight(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(
        d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_error_is_the_tail_of_the_spectrum(
    shape: tuple[int, int], inputs: bool, gradients: bool
) -> None:
    W = weight(*shape)
    H = correlated(shape[1]) if inputs else None
    G = correlated(shape[0], seed=2) if gradients else None
    s = spectrum(W, of(H), of(G))
    total = weighted_error(W, torch.zeros_like(W), H, G)
    assert s.tail_energy(0) == pytest.approx(total, rel=1e-10)
    for rank in {1, len(s.energies) // 2 or 1, len(s.energies)}:
        factors = s.truncate(rank)
        error = weighted_error(W, product(factors), H, G)
        assert error == pytest.approx(s.tail_energy(rank), rel=1e-8, abs=1e-10 * total)
        assert factors.relative_error == pytest.approx(s.tail_energy(rank) / total, rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_equals_torch_svd(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rank = len(S) // 2 or 1
    factors = spectrum(W).truncate(rank)
    torch.testing.assert_close(
        product(factors), U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_whitened_equals_the_textbook_svd_of_the_whitened_weight(shape: tuple[int, int]) -> None:
    """SVD-LLM as its paper writes it: SVD of W L, cut, times the inverse of L."""
    W, H = weight(*shape), correlated(shape[1])
    L = torch.linalg.cholesky(H)
    U, S, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    expected = U[:, :9] * S[:9] @ Vh[:9] @ torch.linalg.inv(L)
    factors = spectrum(W, of(H)).truncate(9)
    torch.testing.assert_close(product(factors), expected, rtol=1e-8, atol=1e-9)


def test_identity_metric_is_the_plain_svd() -> None:
    W = weight(30, 20)
    a, b = spectrum(W).truncate(7), spectrum(W, of(torch.eye(20).double())).truncate(7)
    torch.testing.assert_close(product(a), product(b), rtol=1e-10, atol=1e-10)


def test_both_branches_minimise_the_same_error() -> None:
    """A tall weight padded with zero columns becomes wide: same function, the other branch."""
    W, H = weight(40, 24), correlated(24)
    wide = torch.cat([W, torch.zeros(40, 30, dtype=torch.float64)], dim=1)
    H_wide = torch.block_diag(H, torch.eye(30, dtype=torch.float64))
    tall_factors, wide_factors = (
        spectrum(W, of(H)).truncate(8),
        spectrum(wide, of(H_wide)).truncate(8),
    )
    torch.testing.assert_close(
        tall_factors.B @ tall_factors.A, (wide_factors.B @ wide_factors.A)[:, :24],
        rtol=1e-8, atol=1e-9,
    )  # fmt: skip
    assert tall_factors.relative_error == pytest.approx(wide_factors.relative_error, rel=1e-9)


def test_no_other_factors_of_the_rank_do_better() -> None:
    W, H = weight(24, 40), correlated(40)
    factors = spectrum(W, of(H)).truncate(6)
    best = weighted_error(W, product(factors), H)
    g = torch.Generator().manual_seed(3)
    for size in (1e-3, 1e-2, 1e-1):
        B = factors.B + size * torch.randn(factors.B.shape, generator=g, dtype=torch.float64)
        A = factors.A + size * torch.randn(factors.A.shape, generator=g, dtype=torch.float64)
        assert weighted_error(W, B @ A, H) > best


def test_full_rank_gives_the_weight_back() -> None:
    for shape in SHAPES:
        W = weight(*shape)
        factors = spectrum(W, of(correlated(shape[1]))).truncate(min(shape))
        torch.testing.assert_close(product(factors), W, rtol=1e-7, atol=1e-8)


def test_the_two_factors_share_the_scale_of_every_component() -> None:
    factors = spectrum(weight(24, 40), of(correlated(40))).truncate(10)
    torch.testing.assert_close(factors.B.norm(dim=0), factors.A.norm(dim=1))


def test_loss_falls_with_rank_and_is_zero_at_the_end() -> None:
    s = spectrum(weight(24, 40), of(correlated(40)))
    losses = [s.tail(rank) for rank in range(25)]
    assert losses[0] == 1
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_same_input_gives_the_same_bits() -> None:
    W, H = weight(40, 24), correlated(24)
    first, second = spectrum(W, of(H)).truncate(5), spectrum(W, of(H)).truncate(5)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)


def test_inputs_are_left_alone() -> None:
    W, H = weight(40, 24).float(), correlated(24).float()
    W_before, H_before = W.clone(), H.clone()
    spectrum(W, of(H), damp=1e-3).truncate(5)
    assert torch.equal(W, W_before)
    assert torch.equal(H, H_before)


def test_dead_channels_and_few_tokens_fall_back_and_say_so() -> None:
    W = weight(40, 24)
    H = correlated(24, tokens=10)  # rank 10 of 24: no Cholesky without damping
    H[3] = 0
    H[:, 3] = 0
    s = spectrum(W, of(H))
    assert s.fallback is not None
    assert "damping raised" in s.fallback
    factors = s.truncate(10)
    assert torch.isfinite(product(factors)).all()
    total = weighted_error(W, torch.zeros_like(W), H)
    assert weighted_error(W, product(factors), H) < 1e-6 * total  # ten directions are all


def test_zero_inputs_are_factored_without_the_metric() -> None:
    W = weight(24, 40)
    s = spectrum(W, of(torch.zeros(40, 40)))
    assert s.fallback == "inputs were all zero; left out of the metric"
    torch.testing.assert_close(s.energies, spectrum(W).energies)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_zero_gradients_leave_the_whitened_problem(shape: tuple[int, int]) -> None:
    W, H = weight(*shape), correlated(shape[1])
    s = spectrum(W, of(H), of(torch.zeros(shape[0], shape[0])), gradient_damp=1e-4)
    assert s.fallback == "gradients were all zero; left out of the metric"
    torch.testing.assert_close(s.energies, spectrum(W, of(H)).energies)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_two_sided_equals_the_textbook_svd_between_symmetric_roots(shape: tuple[int, int]) -> None:
    """K-FAC as its papers write it: SVD of G^{1/2} W H^{1/2}, cut, both roots taken off."""
    W, H, G = weight(*shape), correlated(shape[1]), correlated(shape[0], seed=2)
    left, right = symmetric_root(G), symmetric_root(H)
    U, S, Vh = torch.linalg.svd(left @ W @ right, full_matrices=False)
    cut = U[:, :9] * S[:9] @ Vh[:9]
    expected = torch.linalg.solve(left, torch.linalg.solve(right, cut.T).T)
    s = spectrum(W, of(H), of(G))
    torch.testing.assert_close(s.energies, S**2, rtol=1e-10, atol=1e-12 * float(S[0] ** 2))
    torch.testing.assert_close(product(s.truncate(9)), expected, rtol=1e-8, atol=1e-8)
    assert weighted_error(product(s.truncate(9)), expected, H, G) < 1e-12 * s.tail_energy(0)


def symmetric_root(M: Tensor) -> Tensor:
    e, Q = torch.linalg.eigh(M)
    return Q * e.clamp_min(0).sqrt() @ Q.T


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_weight_and_its_transpose_with_swapped_metrics_are_one_problem(
    shape: tuple[int, int],
) -> None:
    W, H, G = weight(*shape), correlated(shape[1]), correlated(shape[0], seed=2)
    a = spectrum(W, of(H), of(G), damp=1e-3, gradient_damp=1e-2)
    b = spectrum(W.T, of(G), of(H), damp=1e-2, gradient_damp=1e-3)
    assert torch.equal(a.energies, b.energies)
    assert torch.equal(a.B, b.A.T)
    assert torch.equal(a.A, b.B.T)


def test_both_branches_of_a_square_weight_find_one_optimum() -> None:
    """Transposed, the other metric is the one that gets factored."""
    W, H, G = weight(30, 30), correlated(30), correlated(30, seed=2)
    a, b = spectrum(W, of(H), of(G)), spectrum(W.T.clone(), of(G), of(H))
    torch.testing.assert_close(a.energies, b.energies, rtol=1e-8, atol=1e-12 * float(a.energies[0]))
    error = weighted_error(product(a.truncate(8)), product(b.truncate(8)).T, H, G)
    assert error < 1e-12 * a.tail_energy(0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_gradients_that_count_every_output_the_same_change_nothing(shape: tuple[int, int]) -> None:
    W, H = weight(*shape), correlated(shape[1])
    a = spectrum(W, of(H), of(torch.eye(shape[0]).double())).truncate(7)
    torch.testing.assert_close(
        product(a), product(spectrum(W, of(H)).truncate(7)), rtol=1e-8, atol=1e-9
    )
    eyes = (of(torch.eye(shape[1]).double()), of(torch.eye(shape[0]).double()))
    torch.testing.assert_close(
        product(spectrum(W, *eyes).truncate(7)), product(spectrum(W).truncate(7)),
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("damp", [0.0, 1e-2])
def test_an_image_serves_as_well_as_the_whole_moment(shape: tuple[int, int], damp: float) -> None:
    """The longer side is only ever seen through the weight."""
    W, H, G = weight(*shape), correlated(shape[1]), correlated(shape[0], seed=2)
    whole = spectrum(W, of(H), of(G), damp=damp, gradient_damp=damp)
    if shape[0] < shape[1]:
        seen = spectrum(W, image_of(H, W), of(G), damp=damp, gradient_damp=damp)
    else:
        seen = spectrum(W, of(H), image_of(G, W.T), damp=damp, gradient_damp=damp)
    # Eigenvalues are off by a share of the largest: 1e-13 is some ten times the size times eps.
    close = 1e-13 * float(whole.energies[0])
    torch.testing.assert_close(seen.energies, whole.energies, rtol=1e-10, atol=close)
    torch.testing.assert_close(
        product(seen.truncate(6)), product(whole.truncate(6)), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_damping_is_the_identity_added_to_both_metrics(shape: tuple[int, int]) -> None:
    W, H, G = weight(*shape), correlated(shape[1]), correlated(shape[0], seed=2)
    damped_by_hand = spectrum(W, of(damped(H, 1e-2)), of(damped(G, 1e-3)))
    s = spectrum(W, of(H), of(G), damp=1e-2, gradient_damp=1e-3)
    close = 1e-13 * float(s.energies[0])  # eigenvalues are off by a share of the largest
    torch.testing.assert_close(s.energies, damped_by_hand.energies, rtol=1e-10, atol=close)


def test_the_shorter_side_needs_its_whole_moment() -> None:
    W = weight(40, 24)
    with pytest.raises(ValueError, match="24 channels is needed, but only its image"):
        spectrum(W, image_of(correlated(24), W))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("two_sided", [False, True])
def test_energies_alone_are_those_of_the_spectrum(shape: tuple[int, int], two_sided: bool) -> None:
    W, H = weight(*shape), of(correlated(shape[1]))
    G = of(correlated(shape[0], seed=2)) if two_sided else None
    energies = spectrum(W, H, G, gradient_damp=1e-3).energies
    alone = energies_only(W, H, G, gradient_damp=1e-3)
    torch.testing.assert_close(alone, energies, rtol=1e-10, atol=1e-13 * float(energies[0]))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_dead_channels_and_singular_metrics_on_both_sides(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    H, G = correlated(shape[1], tokens=10), correlated(shape[0], tokens=12, seed=2)
    for M in (H, G):
        M[3] = 0
        M[:, 3] = 0
    s = spectrum(W, of(H), of(G))
    assert s.fallback is not None
    near = "gradients" if shape[0] < shape[1] else "inputs"
    assert s.fallback.startswith(f"{near}: damping raised from 0")
    factors = s.truncate(10)
    assert torch.isfinite(product(factors)).all()
    error = weighted_error(W, product(factors), H, G)
    assert error < 1e-6 * weighted_error(W, torch.zeros_like(W), H, G)  # ten directions are all


def test_an_indefinite_metric_is_factored_by_eigenvectors_and_said() -> None:
    """Sums in low precision can end up slightly indefinite, here grossly so."""
    W, G = weight(24, 40), torch.eye(24).double()
    G[0, 0] = -0.5
    s = spectrum(W, of(correlated(40)), of(G))
    assert s.fallback == "gradients: Cholesky failed; whitened by eigenvectors"
    torch.testing.assert_close(s.B @ s.A, W, rtol=1e-8, atol=1e-8)


def test_a_rank_beyond_the_weights_own_is_lowered_and_said() -> None:
    W = weight(24, 5) @ weight(5, 40)
    factors = spectrum(W).truncate(12)
    assert factors.rank == 5
    assert factors.fallback == "rank lowered from 12 to 5, the numerical rank of the weight"
    torch.testing.assert_close(product(factors), W, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 25])
def test_ranks_that_do_not_exist_are_rejected(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[1, 24\], got"):
        spectrum(weight(24, 40)).truncate(rank)


def test_bfloat16_factors_lose_little_beyond_the_truncation() -> None:
    W = weight(48, 64).bfloat16()
    H = correlated(64)
    factors = spectrum(W, of(H)).truncate(16)
    exact = weighted_error(W, product(factors), H)
    rounded = weighted_error(W, factors.B.bfloat16().double() @ factors.A.bfloat16().double(), H)
    assert rounded < 1.01 * exact  # 1.0008 measured


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_moments_summed_in_float32_lose_next_to_nothing(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    H, G = correlated(shape[1]), correlated(shape[0], seed=2)
    damping = {"damp": 1e-6, "gradient_damp": 1e-4}
    rounded = spectrum(W.bfloat16(), of(H.float()), of(G.float()), **damping).truncate(16)
    exact = spectrum(W.bfloat16(), of(H), of(G), **damping).truncate(16)
    errors = [weighted_error(W.bfloat16(), product(f), H, G) for f in (rounded, exact)]
    assert errors[0] < 1.001 * errors[1]  # 1.0000 measured
