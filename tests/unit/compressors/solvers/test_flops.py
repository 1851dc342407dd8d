"""Arithmetic as estimated, against what torch counts while a method is at work."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lrc.compressors.methods.base import FixedSizeMethod
from lrc.compressors.methods.fixed_size import LOW_RANK_PLUS_SPARSE
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.rate_distortion import FRACTIONS
from lrc.compressors.solvers import sampled_curves
from lrc.compressors.solvers.moments import Moment, Statistics

D_OUT, D_IN = 96, 64
SIZES = {
    "sparse": {"nonzeros": D_OUT * D_IN // 2},
    "sum": {"rank": 4, "nonzeros": D_OUT * D_IN // 2},
    "dictionary": {"atoms": 48, "nonzeros": 16},
    "compot": {"atoms": 48, "nonzeros": 24},
    "rocket": {"atoms": 48, "nonzeros": 24},
    "tensor-train": {"bond": 32},
}
FIXED_SIZE = {**METHODS, "sum": LOW_RANK_PLUS_SPARSE}
DAMPING = {"damp": 1e-6, "gradient_damp": 0.1}
OPTIONS = {
    name: DAMPING
    | {
        "dictionary": {"rounds": 15},
        "compot": {"rounds": 20},
        "tensor-train": {"rounds": 1, "cores": 2, "factors": []},
    }.get(name, {})
    for name in SIZES
}


def known() -> tuple[torch.Tensor, Statistics]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, D_IN, generator=generator, dtype=torch.float64)
    g = torch.randn(400, D_OUT, generator=generator, dtype=torch.float64)
    W = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    return W, Statistics(400, inputs=Moment.of(x.T @ x), gradients=Moment.of(g.T @ g))


@pytest.mark.parametrize("name", SIZES)
def test_the_count_is_within_a_factor_of_two_of_the_products_that_are_made(name: str) -> None:
    method = FIXED_SIZE[name]
    assert isinstance(method, FixedSizeMethod)
    W, statistics = known()
    with FlopCounterMode(display=False) as counted:
        method.solve(W, statistics, SIZES[name], **OPTIONS[name])
    made = counted.get_total_flops()
    # Torch leaves out eigenproblems, which count as the products in whose time they are solved.
    expected = 2 * method.flops(D_OUT, D_IN, [SIZES[name]], curve=False, **OPTIONS[name])
    assert made / 2 <= expected
    if name != "compot":
        assert expected <= 2 * made


@pytest.mark.parametrize("sampled_from", [0, D_OUT * D_IN + 1])
def test_the_count_of_a_curve_of_pruning_is_that_of_its_products(
    sampled_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_curves, "SAMPLED_FROM", sampled_from)
    method, (W, statistics) = METHODS["sparse"], known()
    assert isinstance(method, FixedSizeMethod)
    sizes = [{"nonzeros": D_OUT * D_IN * n // 10} for n in (9, 8, 6, 4)]
    with FlopCounterMode(display=False) as counted:
        method.squared_errors(W, statistics, sizes, **DAMPING)
    expected = 2 * method.flops(D_OUT, D_IN, sizes, curve=True, **DAMPING)
    # Inverses and measured energies are left out.
    assert 0.85 <= expected / counted.get_total_flops() <= 1.0


def test_a_curve_takes_more_than_one_solution_and_less_than_as_many() -> None:
    for name, sizes in SIZES.items():
        method = FIXED_SIZE[name]
        assert isinstance(method, FixedSizeMethod)
        one = method.flops(D_OUT, D_IN, [sizes], curve=False, **OPTIONS[name])
        curve = method.flops(D_OUT, D_IN, [sizes] * len(FRACTIONS), curve=True, **OPTIONS[name])
        assert one < curve <= len(FRACTIONS) * one


def test_choosing_once_makes_no_products() -> None:
    for name in ("magnitude", "wanda"):
        method = FIXED_SIZE[name]
        assert isinstance(method, FixedSizeMethod)
        assert method.flops(D_OUT, D_IN, [SIZES["sparse"]], curve=False) == 0
