"""Scales of super-blocks: multiples of common numbers that cost little."""

import pytest
import torch

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.super_blocks import common_digits, largest_multiple, split_scales
from lrc.compressors.solvers.common_scales import common_scales, round_up
from lrc.compressors.solvers.gptq import gptq, gptq_together
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.quantization_grid import find_grid, round_to_grid

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [31, 127])
def test_common_numbers_times_multiples_are_exact(largest: int, dtype: torch.dtype) -> None:
    digits = common_digits(dtype, largest)
    assert digits == (8 if dtype == torch.bfloat16 else 11) - len(f"{largest:b}")
    numbers = torch.logspace(-9, 2.4, 200, dtype=torch.float64)
    common = round_up(numbers, digits)
    assert bool((common >= numbers).all())
    # The next larger number of so many digits, where float16 has it.
    normal = numbers > 2.0 ** (digits - 15)
    assert bool((common / numbers)[normal].max() <= 1 + 2.0 ** (1 - digits))
    assert torch.equal(common.half().double(), common)
    products = common[:, None] * torch.arange(1, largest + 1).double()
    assert torch.equal(products.to(dtype).double(), products)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 6])
def test_scales_that_are_multiples_already_are_found_again(bits: int, dtype: torch.dtype) -> None:
    args = QuantizationArgs.parse(f"int{bits}-g16-s256")
    largest = largest_multiple(args)
    generator = torch.Generator().manual_seed(0)
    multiples = torch.randint(1, largest + 1, (5, 32), generator=generator)
    multiples[:, ::16] = largest
    multiples[1] *= -1
    planted = (multiples * 2.0**-9).to(dtype)

    def error_of(scale: torch.Tensor) -> torch.Tensor:
        return (scale.double() - planted.double()).square()

    found = common_scales(planted, 16, largest, dtype, error_of)
    assert torch.equal(found, planted)
    split = split_scales(found, args)
    assert split is not None
    common, parts = split
    assert torch.equal(parts.double(), multiples.double())
    assert bool((common == 2.0**-9).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 6])
def test_the_condition_costs_little(bits: int, dtype: torch.dtype) -> None:
    W = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.ones(512).double()

    def error(written: str) -> float:
        scheme = QuantizationArgs.parse(written)
        grid = find_grid(W, scheme, dtype=dtype, weights=weights)
        scale, _ = grid.expand(512)
        return float((round_to_grid(W, grid, scheme) * scale.double() - W).square().sum())

    free, common = error(f"int{bits}-g16"), error(f"int{bits}-g16-s256")
    # The common number is at most 1/largest of the largest scale, times what rounding it to few
    # digits adds. In groups of normal numbers, scales are at least about half as large as that, so
    # that they are off by up to one common number over the largest scale; the error of numbers that
    # are not clipped grows with the square of a step.
    args = QuantizationArgs.parse(f"int{bits}-g16-s256")
    largest = largest_multiple(args)
    digits = common_digits(dtype, largest)
    assert common <= free * (1 + (1 + 2.0 ** (1 - digits)) / largest) ** 2


def test_a_common_divisor_of_the_multiples_does_not_limit_them() -> None:
    args = QuantizationArgs.parse("int3-g16-s256")
    scale = torch.full((2, 16), 31 * 63 * 2.0**-20, dtype=torch.float16)
    scale[1] *= 2
    split = split_scales(scale, args)
    assert split is not None
    common, multiples = split
    assert torch.equal(common.double() * multiples.double(), scale.double())
    every = common[:, :, None].double() * torch.arange(1, 32).double()
    assert torch.equal(every.half().double(), every)


def test_groups_of_zeros_do_not_change_the_others() -> None:
    W = torch.randn(2, 512, generator=torch.Generator().manual_seed(2)) * 1e-3
    W[1] = W[0]
    W[1, 256:272] = 0
    args = QuantizationArgs.parse("int3-g16-s256")
    scale = find_grid(W, args, dtype=torch.float16, weights=torch.ones(512)).scale
    assert torch.equal(scale[0, :16], scale[1, :16])
    assert float(scale[1].abs().max()) < 1e-2


@pytest.mark.parametrize("together", [False, True])
def test_coordinate_descent_keeps_the_common_numbers(together: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    W, X = torch.randn(12, 512, generator=generator), torch.randn(900, 512, generator=generator)
    H, args = (X.T @ X).double(), QuantizationArgs.parse("int3-g16-s256")
    options = {"dtype": torch.bfloat16}
    if together:
        found = gptq_together([W, -W], [H, H], args, **options)[1]
    else:
        found = gptq(W, H, args, **options)
    assert split_scales(found.scale, args) is not None
    start = gptq(W, H, args, passes=0, **options)
    assert not torch.equal(found.scale.abs(), start.scale.abs())
    sign = -1 if together else 1
    assert weighted_error(sign * W, found.weight(), H) < weighted_error(W, start.weight(), H)


def test_scales_do_not_overflow() -> None:
    args = QuantizationArgs.parse("int6-g16-s256")
    W = torch.randn(4, 256, generator=torch.Generator().manual_seed(4))
    W *= 31 * 64000 / W.abs().amax(1, keepdim=True)
    scale = find_grid(W, args, dtype=torch.float16, weights=torch.ones(256)).scale
    assert bool(scale.isfinite().all())
    assert split_scales(scale, args) is not None
