"""Pivoted products: kernels and plain operations agree with a float64 reference."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.compressors.kernels import pivoted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Awkward: odd ranks and widths, one row besides the pivots, more rows than a block, wide ranks.
SHAPES = [(5, 3), (24, 23), (96, 40), (131, 67), (600, 290)]
TOKENS = [1, 2, 16, 17, 33]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels() -> Any:
    """Return the Triton kernels, on a GPU or interpreted (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from lrc.compressors.kernels import pivoted_triton

    return pivoted_triton


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    chosen: tuple[int, int] = request.param
    return chosen


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def example(
    n: int, d_out: int, rank: int, dtype: torch.dtype, *, ascending: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p, c, order and the result in float64."""
    g = torch.Generator().manual_seed(n + d_out)
    rows = torch.randperm(d_out, generator=g)
    if ascending:
        rows = torch.cat([rows[:rank].sort().values, rows[rank:].sort().values])
    order = torch.empty_like(rows)
    order[rows] = torch.arange(d_out)
    # Columns of a wider product, as `StackedFactors` returns them.
    p = torch.randn(n, rank + 3, generator=g).to(dtype)[:, 1 : rank + 1]
    c = torch.randn(d_out - rank, rank, generator=g).to(dtype)
    expected = torch.cat([p.double(), p.double() @ c.double().T], dim=1)[:, order]
    device = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
    return p.to(device), c.to(device), order.to(torch.int16).to(device), expected


def assert_close(
    found: Tensor, expected: Tensor, size: int, rounding: Callable[..., float]
) -> None:
    dtype = found.dtype
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    # Sums in float32 (checked against the dtype's own sums on a CPU), one rounding at the end.
    bound = rounding(size, torch.float32) + torch.finfo(dtype).eps
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("ascending", [True, False])
def test_plain_operations_agree(shape, dtype, n, ascending, rounding) -> None:
    p, c, order, expected = example(n, *shape, dtype, ascending=ascending)
    rows = pivoted.pivoted_rows(p, c, order, pivoted.inverse_of(order))
    assert_close(rows, expected, shape[1], rounding)
    assert_close(pivoted.interleave_by_rows(p, c, order), expected, shape[1], rounding)
    placed = pivoted.interleave(p, (p.double() @ c.double().T).to(dtype), order)
    assert_close(placed, expected, shape[1], rounding)


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("ascending", [True, False])
def test_the_kernel_for_few_rows_agrees(kernels, shape, dtype, n, ascending, rounding) -> None:
    if INTERPRETED and n > 1 and dtype == torch.bfloat16:
        pytest.skip("the interpreter of Triton multiplies bfloat16 matrices as integers")
    p, c, order, expected = example(n, *shape, dtype, ascending=ascending)
    found = kernels.few_rows(p, c, pivoted.inverse_of(order))
    assert_close(found, expected, shape[1], rounding)
    product = kernels.few_rows(p, c, None)
    assert_close(product, p.double().cpu() @ c.double().cpu().T, shape[1], rounding)
    for blocks in (kernels.Blocks(16, 16), kernels.Blocks(32, 128)):
        found = kernels.few_rows(p, c, pivoted.inverse_of(order), blocks)
        assert_close(found, expected, shape[1], rounding)


@pytest.mark.parametrize("n", TOKENS)
def test_the_kernel_that_interleaves_moves_every_bit(kernels, shape, dtype, n) -> None:
    p, c, order, _ = example(n, *shape, dtype)
    others = p @ c.T
    found = kernels.interleave(p, others, order)
    assert torch.equal(found, torch.cat([p, others], dim=1).index_select(1, order.int()))


def test_order_and_inverse_are_opposites() -> None:
    _, _, order, _ = example(1, 131, 67, torch.float32)
    inverse = pivoted.inverse_of(order)
    assert inverse.dtype == torch.int32
    assert torch.equal(inverse[order.int()].cpu(), torch.arange(131, dtype=torch.int32))


def test_operators_are_registered_completely() -> None:
    p, c, order, _ = example(3, 24, 8, torch.float32)
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (pivoted.pivoted_rows_op, (p, c, order, pivoted.inverse_of(order))),
        (pivoted.interleave_op, (p, p @ c.T, order)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)
