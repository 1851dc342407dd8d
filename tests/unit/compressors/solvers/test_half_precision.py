"""Products in half precision, against products in double precision and exact properties."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers import mask_search
from lrc.compressors.solvers.half_precision import HalfPrecisionMetric
from lrc.compressors.solvers.mask_search import SEARCH_DAMP, MaskSearch
from lrc.compressors.solvers.metric import Metric

ROUNDING = 2.0**-11
"""Relative error of a number that is rounded to float16."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlation(*shape: int, seed: int) -> Tensor:
    """Positive definite matrices of unit diagonal, with a power-law spectrum."""
    X = normal(*shape[:-1], 2 * shape[-1], seed=seed) * torch.arange(1, 2 * shape[-1] + 1) ** -0.5
    M = X @ X.mT
    d = M.diagonal(dim1=-2, dim2=-1).sqrt()
    return M / d[..., :, None] / d[..., None, :]


def metrics() -> list[Metric]:
    H, G = correlation(48, 48, seed=1), correlation(32, 32, seed=2)
    return [Metric(H, G), Metric(H, None), Metric(None, G), Metric(H, G.diagonal()), Metric()]


@pytest.mark.parametrize("metric", metrics(), ids=["both", "H", "G", "diagonal", "none"])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_products_differ_by_rounding_errors(metric: Metric, size: float) -> None:
    E = normal(32, 48, seed=0) * size
    exact = metric.to(torch.float64)(E.double())
    most = Metric(*(None if M is None else M.abs().double() for M in (metric.H, metric.G)))
    found = HalfPrecisionMetric.of(metric)(E)
    assert found.dtype == torch.float32
    # Each product rounds both of its operands; the sums are in float32.
    assert ((found - exact).abs() <= 5 * ROUNDING * most(E.abs().double())).all()


def test_the_scale_of_an_error_changes_nothing_else() -> None:
    metric = HalfPrecisionMetric.of(metrics()[0])
    E = normal(32, 48, seed=0)
    assert torch.equal(metric(E * 2.0**60), metric(E) * 2.0**60)
    assert not metric(torch.zeros(32, 48)).any()


def test_a_stack_has_the_products_of_its_matrices() -> None:
    H, G = correlation(3, 48, 48, seed=1), correlation(3, 32, 32, seed=2)
    # Each has a scale of its own: that of the first is far outside of the range of float16.
    E = normal(3, 32, 48, seed=0) * torch.tensor([1e12, 1.0, 1e-12])[:, None, None]
    together = HalfPrecisionMetric.of(Metric(H, G))
    for at, found in enumerate(together(E)):
        alone = HalfPrecisionMetric.of(Metric(H[at], G[at]))(E[at])
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def test_numbers_of_an_inverse_are_in_the_range() -> None:
    """Also of a metric of rank one, whose inverse is the largest possible one."""
    ones = Metric(torch.ones(48, 48).double(), torch.ones(32, 32).double())
    inverse = HalfPrecisionMetric.of(ones.inverse(SEARCH_DAMP, torch.float32)[0])
    assert inverse.H is not None
    assert inverse.H.isfinite().all()
    assert inverse.G is not None
    assert inverse.G.isfinite().all()


def test_inverses_beyond_the_range_are_limited_to_it() -> None:
    """As they are without damping if most channels have no energy: their diagonals are 0."""
    H = torch.diag(torch.tensor([1.0] + [0.0] * 47).double())
    inverse = Metric(H).inverse(SEARCH_DAMP, torch.float32)[0]
    assert inverse.H is not None
    assert inverse.H.max() > torch.finfo(torch.float16).max
    E = torch.zeros(32, 48)
    E[:, 0] = 1
    found = HalfPrecisionMetric.of(inverse)(E)
    torch.testing.assert_close(found, E @ inverse.H, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [None, slice(None, None, 4)], ids=["all", "sampled"])
def test_a_search_finds_masks_as_good(rows: slice | None, monkeypatch: pytest.MonkeyPatch) -> None:
    W = normal(128, 96, seed=0).double()
    metric = Metric(correlation(96, 96, seed=1).double(), correlation(128, 128, seed=2).double())

    def energy() -> float:
        search = MaskSearch.of(W, metric, "unstructured")
        part, weight = search, W
        if rows is not None:
            part, weight = search.of_rows(rows), W[rows]
        state = part.best(part.dense(), weight.numel() // 2, 8)
        error = part.unscaled(part.refined(state))
        measure = metric if rows is None else metric.of_rows(rows)
        return float(measure.energy(torch.where(state.mask, error, weight)))

    expected, made = energy(), mask_search._for_products
    monkeypatch.setattr(mask_search, "_for_products", lambda metric, half: made(metric, half=True))
    # The search is approximate: 1.5 % of the energy also change with the order of additions.
    assert energy() == pytest.approx(expected, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stack", [(), (2,)], ids=["one", "stack"])
def test_a_gpu_computes_the_same(stack: tuple[int, ...]) -> None:
    metric = Metric(correlation(*stack, 48, 48, seed=1), correlation(*stack, 32, 32, seed=2))
    E = normal(*stack, 32, 48, seed=0)
    expected = HalfPrecisionMetric.of(metric)(E)
    on_gpu = Metric(*(M.cuda() for M in (metric.H, metric.G) if M is not None))
    found = HalfPrecisionMetric.of(on_gpu)(E.cuda())
    atol = float(expected.abs().max()) * 1e-3  # the second rounding may go the other way
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=atol)
