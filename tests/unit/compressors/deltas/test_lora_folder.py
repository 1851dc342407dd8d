"""Factors of adapters: their products, scaling, ranks and balance."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors.deltas.adapter_delta import encode_adapter
from lrc.compressors.deltas.calibrated_moments import Moments
from lrc.compressors.deltas.lora_folder import Lora, keys, truncated_product
from lrc.compressors.deltas.ranks import truncated
from lrc.compressors.solvers.moments import Moment
from lrc.configs.delta_methods import DeltaMethod, LowRank, Sparse, Ternary


def lora(**config: Any) -> Lora:
    """Return an adapter of two layers whose products have three large singular values."""
    g = torch.Generator().manual_seed(0)
    spectrum = torch.tensor([1, 0.5, 0.3, 0.01, 0.01, 0.01])
    tensors = {}
    for module in ("layers.0.q", "layers.1.q"):
        mixing = torch.randn(6, 6, generator=g)
        B = torch.linalg.qr(torch.randn(24, 6, generator=g)).Q * spectrum
        A = torch.linalg.qr(torch.randn(32, 6, generator=g)).Q.T
        first, second = keys(module)
        tensors |= {first: mixing @ A, second: B @ torch.linalg.inv(mixing)}
    return Lora(Path("adapter"), {"r": 6, "lora_alpha": 12, **config}, tensors)


@pytest.mark.parametrize("shape", [(9, 4, 7), (3, 4, 7), (9, 4, 2)])
def test_the_truncated_product_is_the_best_one(shape: tuple[int, int, int]) -> None:
    d_out, rank, d_in = shape
    g = torch.Generator().manual_seed(0)
    B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    A = torch.randn(rank, d_in, generator=g, dtype=torch.float64)
    S = torch.linalg.svdvals(B @ A)[: min(shape)]
    for kept in (1, 2):
        B_hat, A_hat, values = truncated_product(B, A, kept)
        assert (B_hat.shape, A_hat.shape) == ((d_out, kept), (kept, d_in))
        torch.testing.assert_close(values, S)
        error = (B @ A - B_hat @ A_hat).square().sum()
        torch.testing.assert_close(error, S[kept:].square().sum(), rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, [2.0, 2.0]),
        ({"use_rslora": True}, [12 / 6**0.5] * 2),
        ({"alpha_pattern": {"layers.1.q": 3}}, [2.0, 0.5]),
    ],
    ids=str,
)
def test_other_ranks_keep_the_scaling(config: dict[str, Any], scaling: list[float]) -> None:
    found = lora(**config)
    assert [found.scaling(module) for module in found.modules] == pytest.approx(scaling)
    smaller = truncated(found, {"layers.0.q": 2, "layers.1.q": 3})
    assert [smaller.scaling(module) for module in found.modules] == pytest.approx(scaling)
    ranks = {smaller.config["r"], *smaller.config["rank_pattern"].values()}
    assert ranks == {2, 3}


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_the_error_of_a_rank_is_the_tail_of_the_spectra(rank: int) -> None:
    tail = torch.tensor([1, 0.5, 0.3, 0.01, 0.01, 0.01]).square()
    expected = float((tail[rank:].sum() / tail.sum()).sqrt())
    found = error_of(LowRank(method="low-rank", rank=rank, dtype="float32"))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_calibrated_factors_are_those_of_the_whole_product() -> None:
    g = torch.Generator().manual_seed(2)
    sides = []
    for d in (32, 24):
        x = torch.randn(100, d, generator=g, dtype=torch.float64) * torch.logspace(-2, 1, d)
        sides.append(Moment.of(x.T @ x))
    metric, whole = Moments(*sides), lora()
    result = truncated(whole, {module: 2 for module in whole.modules}, lambda name: metric)
    for module in whole.modules:
        B, A = (factor.double() for factor in whole.factors(module))
        best = metric.spectrum(B @ A).truncate(2)
        found = torch.linalg.multi_dot([each.double() for each in result.factors(module)])
        torch.testing.assert_close(found, best.B @ best.A, rtol=0, atol=1e-5)
        plain = truncated_product(B, A, 2)
        errors = [metric.energy(each - B @ A) for each in (found, plain[0] @ plain[1])]
        assert errors[0] < 0.9 * errors[1]


def error_of(options: DeltaMethod) -> float:
    relative: float = encode_adapter(lora(), options)[1].sizes(1)["relative_error"]
    return relative


def test_no_other_scale_of_the_product_has_a_smaller_error() -> None:
    least = error_of(Ternary(method="ternary", density=0.5, balance="stored"))
    for alpha in (0.9, 0.99, 1.01, 1.1):
        options = Ternary(method="ternary", density=0.5, balance="stored", alpha=alpha)
        assert error_of(options) > least
    assert least < error_of(Ternary(method="ternary", density=0.5, balance="stored", scale="std"))


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_measured_factors_have_the_least_error(density: float) -> None:
    errors = {
        balance: error_of(Ternary(method="ternary", density=density, balance=balance))
        for balance in ("measured", "stored", "even", "rotated")
    }
    assert errors["measured"] <= min(errors.values()) * (1 + 1e-9)
    if density == 0.1:
        assert errors["even"] < 0.8 * errors["stored"]


def test_an_adapter_that_is_kept_whole_is_exact() -> None:
    whole, found = encode_adapter(lora(), Sparse(method="sparse", density=1.0))
    assert found.error == 0
    assert whole.tensors.keys() == lora().tensors.keys()


def test_matrices_narrower_than_the_rank_are_compressed() -> None:
    whole = lora()
    B, A = whole.factors("layers.0.q")
    narrow = whole.with_factors({"layers.0.q": (B[:4], A)})
    _, found = encode_adapter(narrow, Ternary(method="ternary", density=1.0))
    assert [report.shape for report in found.reports] == [[4, 6], [6, 32]]
    assert 0 < found.sizes(1)["relative_error"] < 1
