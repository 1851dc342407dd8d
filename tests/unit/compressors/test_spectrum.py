"""The solver of the SVD family: identities first, then an independent implementation."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.decompose.spectrum import spectrum
from lrc.compressors.linalg import weighted_error

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 16), (16, 1)]


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
@pytest.mark.parametrize("whitened", [False, True])
def test_error_is_the_tail_of_the_spectrum(shape: tuple[int, int], whitened: bool) -> None:
    W = weight(*shape)
    H = correlated(shape[1]) if whitened else None
    s = spectrum(W, H)
    total = weighted_error(W, torch.zeros_like(W), H)
    torch.testing.assert_close(float(s.energies.sum()), total, rtol=1e-10, atol=0)
    for rank in {1, len(s.energies) // 2 or 1, len(s.energies)}:
        factors = s.truncate(rank)
        error = weighted_error(W, factors.B @ factors.A, H)
        assert error == pytest.approx(factors.loss * total, rel=1e-8, abs=1e-10 * total)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_equals_torch_svd(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rank = len(S) // 2 or 1
    factors = spectrum(W).truncate(rank)
    torch.testing.assert_close(
        factors.B @ factors.A, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_whitened_equals_the_textbook_svd_of_the_whitened_weight(shape: tuple[int, int]) -> None:
    """SVD-LLM as its paper writes it: SVD of W L, cut, times the inverse of L."""
    W, H = weight(*shape), correlated(shape[1])
    L = torch.linalg.cholesky(H)
    U, S, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    expected = U[:, :9] * S[:9] @ Vh[:9] @ torch.linalg.inv(L)
    factors = spectrum(W, H).truncate(9)
    torch.testing.assert_close(factors.B @ factors.A, expected, rtol=1e-8, atol=1e-9)


def test_identity_metric_is_the_plain_svd() -> None:
    W = weight(30, 20)
    a, b = spectrum(W).truncate(7), spectrum(W, torch.eye(20, dtype=torch.float64)).truncate(7)
    torch.testing.assert_close(a.B @ a.A, b.B @ b.A, rtol=1e-10, atol=1e-10)


def test_both_branches_minimise_the_same_error() -> None:
    """A tall weight padded with zero columns becomes wide: same function, the other branch."""
    W, H = weight(40, 24), correlated(24)
    wide = torch.cat([W, torch.zeros(40, 30, dtype=torch.float64)], dim=1)
    H_wide = torch.block_diag(H, torch.eye(30, dtype=torch.float64))
    tall_factors, wide_factors = spectrum(W, H).truncate(8), spectrum(wide, H_wide).truncate(8)
    torch.testing.assert_close(
        tall_factors.B @ tall_factors.A, (wide_factors.B @ wide_factors.A)[:, :24],
        rtol=1e-8, atol=1e-9,
    )  # fmt: skip
    assert tall_factors.loss == pytest.approx(wide_factors.loss, rel=1e-9)


def test_no_other_factors_of_the_rank_do_better() -> None:
    W, H = weight(24, 40), correlated(40)
    factors = spectrum(W, H).truncate(6)
    best = weighted_error(W, factors.B @ factors.A, H)
    g = torch.Generator().manual_seed(3)
    for size in (1e-3, 1e-2, 1e-1):
        B = factors.B + size * torch.randn(factors.B.shape, generator=g, dtype=torch.float64)
        A = factors.A + size * torch.randn(factors.A.shape, generator=g, dtype=torch.float64)
        assert weighted_error(W, B @ A, H) > best


def test_full_rank_gives_the_weight_back() -> None:
    for shape in SHAPES:
        W = weight(*shape)
        factors = spectrum(W, correlated(shape[1])).truncate(min(shape))
        torch.testing.assert_close(factors.B @ factors.A, W, rtol=1e-7, atol=1e-8)


def test_the_two_factors_share_the_scale_of_every_component() -> None:
    factors = spectrum(weight(24, 40), correlated(40)).truncate(10)
    torch.testing.assert_close(factors.B.norm(dim=0), factors.A.norm(dim=1))


def test_loss_falls_with_rank_and_is_zero_at_the_end() -> None:
    s = spectrum(weight(24, 40), correlated(40))
    losses = [s.tail(rank) for rank in range(25)]
    assert losses[0] == 1
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_same_input_gives_the_same_bits() -> None:
    W, H = weight(40, 24), correlated(24)
    first, second = spectrum(W, H).truncate(5), spectrum(W, H).truncate(5)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.A, second.A)


def test_inputs_are_left_alone() -> None:
    W, H = weight(40, 24).float(), correlated(24).float()
    W_before, H_before = W.clone(), H.clone()
    spectrum(W, H, damp=1e-3).truncate(5)
    assert torch.equal(W, W_before)
    assert torch.equal(H, H_before)


def test_dead_channels_and_few_tokens_fall_back_and_say_so() -> None:
    W = weight(40, 24)
    H = correlated(24, tokens=10)  # rank 10 of 24: no Cholesky without damping
    H[3] = 0
    H[:, 3] = 0
    s = spectrum(W, H)
    assert s.fallback is not None
    assert "damping raised" in s.fallback
    factors = s.truncate(10)
    assert torch.isfinite(factors.B @ factors.A).all()
    total = weighted_error(W, torch.zeros_like(W), H)
    assert weighted_error(W, factors.B @ factors.A, H) < 1e-6 * total  # ten directions are all


def test_zero_inputs_are_factored_without_the_metric() -> None:
    W = weight(24, 40)
    s = spectrum(W, torch.zeros(40, 40, dtype=torch.float64))
    assert s.fallback == "inputs were all zero; plain SVD"
    torch.testing.assert_close(s.energies, spectrum(W).energies)


def test_a_rank_beyond_the_weights_own_is_lowered_and_said() -> None:
    W = weight(24, 5) @ weight(5, 40)
    factors = spectrum(W).truncate(12)
    assert factors.rank == 5
    assert factors.fallback == "rank lowered from 12 to 5, the numerical rank of the weight"
    torch.testing.assert_close(factors.B @ factors.A, W, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 25])
def test_ranks_that_do_not_exist_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[1, 24\], got"):
        spectrum(weight(24, 40)).truncate(rank)


def test_bfloat16_factors_lose_little_beyond_the_truncation() -> None:
    W = weight(48, 64).bfloat16()
    H = correlated(64)
    factors = spectrum(W, H).truncate(16)
    exact = weighted_error(W, factors.B @ factors.A, H)
    rounded = weighted_error(W, factors.B.bfloat16().double() @ factors.A.bfloat16().double(), H)
    assert rounded < 1.01 * exact  # 1.0008 measured
