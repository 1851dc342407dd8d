"""Narrower heads: the optimum of values and outputs, and the choice of rotary pairs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lrc.compressors.slicing.head_statistics import score_moments
from lrc.compressors.slicing.heads import (
    choose_pairs,
    pair_dimensions,
    project,
    spread,
    take,
    turn_queries,
    value_output,
)

H, N_HEADS, N_KV, LENGTH = 8, 4, 2, 24
FREQUENCIES = 1.0 / 100.0 ** (torch.arange(0, H, 2).float() / H)


@pytest.fixture
def random() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def rotated_scores(q: Tensor, k: Tensor, frequencies: Tensor) -> Tensor:
    """Scores of q [length, n_heads, h] and k [length, n_kv, h] as transformers makes them."""
    angles = torch.arange(len(q)).double()[:, None] * frequencies.double()
    emb = torch.cat([angles, angles], dim=-1)[None]
    q, k = (x.transpose(0, 1)[None] for x in (q, k))
    q, k = apply_rotary_pos_emb(q, k, emb.cos(), emb.sin())
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q @ k.transpose(2, 3))[0]


def test_value_and_output_are_the_truncated_svd_of_their_whitened_product(random):
    W_v, X, W_o = random(H, 12), random(100, 12), random(30, H)
    C_x = X.T @ X
    energies, vectors = torch.linalg.eigh(C_x)
    root = vectors * energies.sqrt() @ vectors.T
    U, s, Vt = torch.linalg.svd(W_o @ W_v @ root, full_matrices=False)
    expected = (U[:, :5] * s[:5]) @ Vt[:5] @ torch.linalg.inv(root)
    P, V, lost, fallback = value_output(W_o, W_v @ C_x @ W_v.T, 5, damp=1e-13)
    torch.testing.assert_close(V @ P @ W_v, expected, rtol=1e-7, atol=1e-8)
    assert lost == pytest.approx(float(s[5:].square().sum() / s.square().sum()), rel=1e-8)
    assert fallback is None


def test_value_and_output_of_full_rank_are_exact(random):
    W_o = random(30, H)
    P, V, lost, _ = value_output(W_o, torch.eye(H), H, damp=1e-2)
    assert torch.equal(V, W_o)
    assert torch.equal(P, torch.eye(H).double())
    assert lost == 0


def test_value_and_output_are_balanced(random):
    X = random(100, H)
    P, V, _, _ = value_output(random(30, H), X.T @ X / 100, 5, damp=1e-10)
    read = (X @ P.T).square().mean(dim=0)
    torch.testing.assert_close(read, V.square().sum(dim=0))


def test_a_value_that_is_always_zero_is_reduced_by_its_readers(random):
    W_o = random(30, H)
    P, V, _, _ = value_output(W_o, torch.zeros(H, H), 5, damp=1e-4)
    s = torch.linalg.svdvals(W_o)
    assert float((W_o - V @ P).norm()) == pytest.approx(float(s[5:].norm()))


@pytest.mark.parametrize("rank", [0, H + 1])
def test_a_rank_out_of_range_is_refused(random, rank):
    with pytest.raises(ValueError, match="rank must be in"):
        value_output(random(30, H), torch.eye(H), rank, damp=1e-4)


def test_score_moments_are_covariances_under_attention(random):
    q, k = random(1, LENGTH, N_HEADS, H), random(1, LENGTH, N_KV, H)
    at = torch.tensor([5, 23])
    M = score_moments(q, k, at, FREQUENCIES, scaling=0.3)
    dims = pair_dimensions(torch.arange(1, 3), H)  # two pairs
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1).double()
    p = (0.3 * rotated_scores(q[0], k[0], FREQUENCIES) + mask).softmax(dim=-1)
    part = 0.3 * rotated_scores(q[0][..., dims], k[0][..., dims], FREQUENCIES[1:3])
    variance = (p * part.square()).sum(-1) - (p * part).sum(-1).square()  # [n_heads, length]
    ones = torch.zeros(H, dtype=torch.float64)
    ones[1:3] = 1
    found = torch.einsum("h,nhg,g->n", ones, M, ones)
    torch.testing.assert_close(found, variance[:, at].sum(dim=1), rtol=1e-5, atol=1e-7)


def test_a_constant_in_the_scores_of_all_keys_does_not_count(random):
    q, k = random(1, LENGTH, N_HEADS, H), torch.ones(1, LENGTH, N_KV, H)
    still = torch.zeros(H // 2)
    M = score_moments(q, k, torch.arange(LENGTH), still, scaling=1.0)
    assert M.abs().max() < 1e-9


def test_all_pairs_are_left_as_they_are(random):
    A = random(N_HEADS, 20, H)
    pairs, turns, lost = choose_pairs(A.transpose(1, 2) @ A, H // 2, damp=1e-4)
    assert pairs.tolist() == list(range(H // 2))
    assert torch.equal(turns, torch.ones_like(turns))
    assert lost == 0


def test_the_turns_are_least_squares(random):
    A = random(N_HEADS, 50, H)
    pairs, turns, lost = choose_pairs(A.transpose(1, 2) @ A, 2, damp=1e-12)
    dims = pair_dimensions(pairs, H)
    wanted = A[:, :, : H // 2].sum(dim=2)
    error = 0.0
    for head in range(N_HEADS):
        found = torch.linalg.lstsq(A[head][:, dims], wanted[head, :, None]).solution[:, 0]
        expected = torch.complex(found[:2], found[2:])
        torch.testing.assert_close(turns[head], expected, rtol=1e-6, atol=1e-8)
        error += float((wanted[head] - A[head][:, dims] @ found).square().sum())
    assert lost == pytest.approx(error / float(wanted.square().sum()), rel=1e-6)


def test_pairs_without_scores_are_removed_first(random):
    q, k = random(2, LENGTH, N_HEADS, H), random(2, LENGTH, N_KV, H)
    q[..., 1], q[..., 1 + H // 2] = 0, 0
    M = score_moments(q, k, torch.arange(LENGTH), FREQUENCIES, scaling=0.3)
    pairs, turns, lost = choose_pairs(M, H // 2 - 1, damp=1e-9)
    assert pairs.tolist() == [0, 2, 3]
    torch.testing.assert_close(turns, torch.ones_like(turns), rtol=1e-4, atol=1e-4)
    assert lost < 1e-10


def test_pairs_of_one_frequency_make_up_for_each_other(random, rounding):
    """The queries of the removed pair are twice those of the kept one, rotated by 90 degrees."""
    q, k = random(2, LENGTH, 1, 4), random(2, LENGTH, 1, 4)
    same = torch.tensor([0.3, 0.3])
    q[..., 1], q[..., 3] = -2 * q[..., 2], 2 * q[..., 0]
    k[..., 1], k[..., 3] = k[..., 0], k[..., 2]
    M = score_moments(q, k, torch.arange(LENGTH), same, scaling=0.3)
    damp = 1e-9
    pairs, turns, lost = choose_pairs(M, 1, damp=damp)
    # The exact weights w of the kept pair lose nothing. What remains is (1, -w) E (1, -w)^T with
    # |w| <= 2, where E is what is added to M: the rounding of its sums in float32, and damping.
    noise = rounding(LENGTH, torch.float32) * float(torch.linalg.matrix_norm(M, 2).max())
    excess = noise + damp * float(M.diagonal(dim1=1, dim2=2).mean())
    assert lost < (1 + 2**2) * excess / float(M[:, :2, :2].sum())
    assert lost < 1e-3
    W = q[0].flatten(1).T  # [4, length]: queries as rows of a weight
    turned = turn_queries(W, pairs, turns, 4).T.reshape(LENGTH, 1, 2)
    kept = pair_dimensions(pairs, 4)
    found = rotated_scores(turned, k[0][..., kept], same[:1])
    expected = rotated_scores(q[0], k[0], same)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_head_without_scores_does_not_matter(random):
    A = random(N_HEADS, 50, H)
    M = A.transpose(1, 2) @ A
    silent = torch.cat([M, torch.zeros(1, H, H)])
    pairs, turns, lost = choose_pairs(silent, 2, damp=1e-6)
    expected = choose_pairs(M, 2, damp=1e-6)
    assert torch.equal(pairs, expected[0])
    assert bool(torch.isfinite(torch.view_as_real(turns)).all())
    assert lost == expected[2]


@pytest.mark.parametrize("count", [0, H])
def test_a_number_of_pairs_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match="count must be in"):
        choose_pairs(torch.eye(H)[None], count, damp=1e-4)


def test_what_is_taken_is_spread_back(random):
    W = random(N_HEADS * H, 5)
    dims = pair_dimensions(torch.tensor([0, 3]), H)
    assert dims.tolist() == [0, 3, 4, 7]
    small = take(W, dims, H)
    assert small.shape == (N_HEADS * 4, 5)
    assert torch.equal(take(spread(small, dims, H), dims, H), small)
    assert torch.equal(take(W[:, 0], dims, H), small[:, 0])


def test_projections_act_on_their_own_heads(random):
    P, W = random(N_KV, 3, H), random(N_KV * H, 5)
    expected = torch.cat([P[0] @ W[:H], P[1] @ W[H:]])
    torch.testing.assert_close(project(W, P), expected)
    torch.testing.assert_close(project(W[:, 0], P), expected[:, 0])
