"""Codecs of tensors: exact cases, least errors, and round trips through the parts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lrc.compressors.deltas.calibrated_moments import DAMPING, Moments
from lrc.compressors.deltas.chosen_places import BITMAP, decode_places, encode_places, largest
from lrc.compressors.deltas.delta_codecs import (
    Encoded,
    decode,
    difference,
    encode_exact,
    encode_integers,
    encode_low_rank,
    encode_sparse,
    encode_ternary,
)
from lrc.compressors.deltas.golomb import code_length
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import spectrum
from lrc.configs.delta_methods import Integers, Sparse, Ternary


def tensors(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    return base.to(dtype), (base + 0.01 * torch.randn(shape, generator=g)).to(dtype)


def ternary(**options: Any) -> Ternary:
    return Ternary(method="ternary", **options)


def sparse(**options: Any) -> Sparse:
    return Sparse(method="sparse", **options)


@pytest.mark.parametrize("seed", range(8))
def test_places_are_those_of_the_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 300))
    for density in (0.0, 0.02, 0.2, 0.6, 1.0):
        places = np.flatnonzero(rng.random(n) < density)
        bits, m = encode_places(places, n)
        assert len(bits) <= n
        found, used = decode_places(np.append(bits, True), len(places), m, n)
        assert np.array_equal(found, places)
        assert used == len(bits)


def test_dense_masks_are_bitmaps_and_sparse_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    for density, is_bitmap in ((0.05, False), (0.5, True)):
        _, m = encode_places(np.flatnonzero(rng.random(1000) < density), 1000)
        assert (m == BITMAP) == is_bitmap


def test_the_largest_numbers_are_chosen_and_the_first_of_equal_ones() -> None:
    numbers = np.array([1.0, 3, 0, 2, 2, 5, 2])
    assert largest(numbers, 4 / 7).tolist() == [1, 3, 4, 5]
    assert largest(numbers, 1.0).tolist() == [0, 1, 3, 4, 5, 6]
    assert largest(numbers, 1e-9).tolist() == [5]
    assert largest(np.zeros(3), 1.0).tolist() == []


def test_ternary_keeps_signs_and_the_mean_magnitude() -> None:
    base, tuned = tensors(16, 24)
    encoded = encode_ternary(base, tuned, ternary(density=0.25))
    change = (tuned - base).flatten()
    kept = change.abs().topk(96).indices
    expected = torch.zeros_like(change)
    expected[kept] = change[kept].sign() * change[kept].abs().mean()
    found = difference(base, decode(encoded, base, torch.float32)).flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_other_scale_has_a_smaller_error() -> None:
    base, tuned = tensors(16, 24)

    def error(**options: Any) -> float:
        encoded = encode_ternary(base.double(), tuned.double(), ternary(density=0.3, **options))
        return float((decode(encoded, base.double(), torch.float64) - tuned).square().sum())

    least = error()
    assert all(error(alpha=alpha) > least for alpha in (0.9, 0.99, 1.01, 1.1))
    assert error(scale="std") > least


def test_the_paper_scale_is_the_standard_deviation_of_all_differences() -> None:
    base, tuned = tensors(16, 24)
    encoded = encode_ternary(base, tuned, ternary(scale="std", alpha=1.5))
    expected = 1.5 * np.std((tuned - base).numpy().astype(np.float64))
    assert float(encoded.parts["scale"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_tensors_of_every_shape_are_restored(shape: tuple[int, ...], density: float) -> None:
    base, tuned = tensors(*shape)
    encoded = encode_ternary(base, tuned, ternary(density=density))
    found = difference(base, decode(encoded, base, torch.float32))
    assert found.shape == torch.Size(shape)
    assert (
        int((found != 0).sum()) == encoded.facts["count"] == max(1, round(density * base.numel()))
    )
    exact = decode(encode_sparse(base, tuned, sparse(density=1.0)), base, torch.float32)
    assert torch.equal(exact, tuned)


@pytest.mark.parametrize("encode", [encode_ternary, encode_sparse, encode_integers])
def test_a_tensor_without_differences_stays_the_same(encode: Any) -> None:
    options: dict[Any, Any] = {
        encode_ternary: ternary(),
        encode_sparse: sparse(),
        encode_integers: Integers(method="int"),
    }
    base, _ = tensors(5, 6)
    assert torch.equal(decode(encode(base, base, options[encode]), base, torch.float32), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_numbers_of_the_tuned_model_are_exact(dtype: torch.dtype) -> None:
    base, tuned = tensors(12, 20, dtype=dtype)
    for encoded in (encode_exact(tuned), encode_sparse(base, tuned, sparse(density=1.0))):
        assert torch.equal(decode(encoded, base, dtype), tuned)


def test_sparse_numbers_are_exact_where_they_are_stored() -> None:
    base, tuned = tensors(12, 20, dtype=torch.bfloat16)
    for values in ("exact", "bfloat16"):
        encoded = encode_sparse(base, tuned, sparse(density=0.1, values=values))
        found = decode(encoded, base, torch.bfloat16)
        changed = found != base
        assert int(changed.sum()) == 24
        torch.testing.assert_close(found[changed], tuned[changed], rtol=1e-2, atol=0)
        assert values != "exact" or torch.equal(found[changed], tuned[changed])
        assert (tuned - base)[changed].abs().min() >= (tuned - base)[~changed].abs().max()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_the_error_of_a_rank_is_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    base, tuned = (tensor.double() for tensor in tensors(*shape))
    S = torch.linalg.svdvals(tuned - base)
    for rank in (1, 4, min(shape)):
        encoded = encode_low_rank(base, tuned, rank, torch.float64)
        error = (decode(encoded, base, torch.float64) - tuned).square().sum()
        torch.testing.assert_close(error, S[rank:].square().sum(), rtol=1e-9, atol=1e-20)


def moments(d_out: int, d_in: int) -> Moments:
    """Return moments of inputs and gradients whose channels differ in size."""
    g = torch.Generator().manual_seed(1)
    sides = []
    for d in (d_in, d_out):
        scale = torch.logspace(-2, 1, d, dtype=torch.float64)
        x = torch.randn(200, d, generator=g, dtype=torch.float64) * scale
        sides.append(Moment.of(x.T @ x))
    return Moments(*sides)


def damped_root(moment: Moment | None, damp: float) -> Tensor:
    """Return the symmetric root of a damped moment."""
    assert moment is not None
    M = moment.whole()
    energies, V = torch.linalg.eigh(M + damp * M.diagonal().mean() * torch.eye(len(M)))
    return (V * energies.sqrt()) @ V.T


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_calibrated_error_of_a_rank_is_the_tail_of_the_weighted_spectrum(
    shape: tuple[int, int],
) -> None:
    base, tuned = (tensor.double() for tensor in tensors(*shape))
    metric = moments(*shape)
    G = damped_root(metric.gradients, DAMPING["gradient_damp"])
    H = damped_root(metric.inputs, DAMPING["damp"])
    S = torch.linalg.svdvals(G @ (tuned - base) @ H)
    for rank in (1, 4, min(shape)):
        encoded = encode_low_rank(base, tuned, rank, torch.float64, metric.spectrum)
        wrong = decode(encoded, base, torch.float64) - tuned
        tail = float(S[rank:].square().sum())
        assert metric.energy(wrong) == pytest.approx(tail, rel=1e-7, abs=1e-12 * float(S[0] ** 2))
        assert float((G @ wrong @ H).square().sum()) == pytest.approx(
            tail, rel=1e-7, abs=1e-12 * float(S[0] ** 2)
        )
        if rank < min(shape):
            plain = encode_low_rank(base, tuned, rank, torch.float64)
            assert metric.energy(decode(plain, base, torch.float64) - tuned) > 1.1 * tail
        else:
            torch.testing.assert_close(wrong, torch.zeros_like(wrong), rtol=0, atol=1e-12)


def test_moments_of_the_identity_give_the_plain_factors() -> None:
    base, tuned = (tensor.double() for tensor in tensors(12, 20))
    same = Moments(*(Moment.of(torch.eye(d, dtype=torch.float64)) for d in (20, 12)))
    found, plain = (
        decode(encode_low_rank(base, tuned, 3, torch.float64, metric.spectrum), base, base.dtype)
        for metric in (same, Moments())
    )
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_what_the_inputs_use_is_kept_rather_than_what_is_large() -> None:
    used, unused = torch.zeros(2, 20, dtype=torch.float64)
    used[:10], unused[10:] = 0.1, 1.0
    base = torch.zeros(12, 20, dtype=torch.float64)
    tuned = torch.ones(12, 1, dtype=torch.float64) * used + torch.eye(12, 1) * unused
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).double()
    x[:, 10:] *= 1e-3
    metric = Moments(Moment.of(x.T @ x))
    plain, found = (
        decode(encode_low_rank(base, tuned, 1, torch.float64, each), base, torch.float64)
        for each in (spectrum, metric.spectrum)
    )
    assert float((x @ (found - tuned).T).norm() / (x @ tuned.T).norm()) < 0.01
    assert float((x @ (plain - tuned).T).norm() / (x @ tuned.T).norm()) > 0.9


@pytest.mark.parametrize("rank", [0, 13])
def test_ranks_out_of_range_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[1, 12\]"):
        encode_low_rank(*tensors(12, 20), rank, torch.float32)


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.6), (3, 0.3), (4, 0.15), (8, 0.01)])
def test_integers_are_within_a_step(bits: int, bound: float) -> None:
    base, tuned = tensors(7, 11)  # 77 numbers: the last group is not full
    encoded = encode_integers(base, tuned, Integers(method="int", bits=bits, group_size=16))
    error = (decode(encoded, base, torch.float32) - tuned).flatten()
    step = encoded.parts["scale"].float().abs().repeat_interleave(16)[:77]
    assert bool((error.abs() <= step + 1e-6).all())
    assert bound / 4 < float(error.norm() / (tuned - base).norm()) < bound


def test_the_counted_bits_are_those_of_the_parts() -> None:
    base, tuned = tensors(32, 32)
    encoded = encode_ternary(base, tuned, ternary(density=0.1))
    places = largest((tuned - base).abs().flatten().numpy(), 0.1)
    gaps = np.diff(places, prepend=-1) - 1
    signs_and_places = code_length(gaps, encoded.facts["m"]) + len(places)
    assert encoded.bits == 8 * -(-signs_and_places // 8) + 32


@pytest.mark.parametrize(
    ("codec", "facts", "parts"),
    [
        ("ternary", {"count": 3, "m": 2}, {"code": torch.zeros(0, dtype=torch.uint8)}),
        ("low_rank", {"rank": 3}, {"a": torch.zeros(7), "b": torch.zeros(9)}),
        ("exact", {}, {"values": torch.zeros(7)}),
        ("exact", {}, {}),
    ],
)
def test_parts_that_do_not_fit_are_refused(codec: str, facts: Any, parts: Any) -> None:
    parts = {"scale": torch.ones(1), **parts} if codec == "ternary" else parts
    with pytest.raises(ValueError, match=r"do not (fit|hold)"):
        decode(Encoded(codec, facts, parts), torch.zeros(3, 4), torch.float32)
