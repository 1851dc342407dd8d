"""Search for the scales and zero points of a quantized matrix.

The range that contains every number of a group is seldom the best one: a narrower range clips a few
numbers and is finer for all others. Scales may be negative, because the lowest code is one step
further from zero than the highest, and the largest number of a group is best put on that side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.io.finite import all_finite
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.quantization_args import SUPER_BLOCK
from lrc.compressors.layers.super_blocks import largest_multiple
from lrc.compressors.solvers.common_scales import common_scales
from lrc.compressors.solvers.cpu_threads import map_in_threads

# Fractions of the full range that are tried. On SmolLM2-135M those below 0.4 lower the error by 4 %
# with two bits and not at all with four; steps half as wide lower it by 1 %.
RANGES = tuple(1 - step / 20 for step in range(16))
# Without statistics of the inputs no number is clipped: clipping lowers the squared error of the
# weight but raises perplexity, on SmolLM2-135M at int4-g64 from 35.6 to 38.4 (C4).
FULL_RANGE: tuple[float, ...] = (1.0,)
NUMBERS = {"cpu": 2**19, "cuda": 2**25}
"""Numbers that are searched together, by type of device: what stays in the caches of a CPU, and
what takes little memory of a GPU."""


class ScaleOverflow(ValueError):
    """A scale is too large for the dtype in which it is stored."""


@dataclass(frozen=True)
class Grid:
    """The scale of every group of numbers, and the code of zero; of a matrix or a stack of them."""

    scale: Tensor
    """[rows, groups], at the precision of the file; may be negative, never zero."""
    zero: Tensor | None
    """[rows, groups], int8; None for a symmetric scheme."""

    def expand(self, columns: int) -> tuple[Tensor, Tensor | None]:
        """Return the scale and zero point of every number, both [..., rows, columns]."""
        width = columns // self.scale.shape[-1]
        scale = self.scale.repeat_interleave(width, dim=-1)
        return scale, None if self.zero is None else self.zero.repeat_interleave(width, dim=-1)


def find_grid(
    W: Tensor, scheme: QuantizationArgs, *, dtype: torch.dtype, weights: Tensor | None = None
) -> Grid:
    """Find the grid that minimizes the error of rounding a matrix to nearest.

    The search is in float32, on numbers relative to the largest of their group. A group of zeros
    gets the scale 1.

    Parameters
    ----------
    W : Tensor, shape [rows, columns]
    dtype : torch.dtype
        Dtype of the stored scales.
    weights : Tensor, shape [columns], optional
        Weight of the squared error of each column, such as the diagonal of a second moment. If
        omitted, the full range of every group is used.

    Raises
    ------
    ValueError
        If `W` is not finite, or its rows cannot be divided into groups.
    ScaleOverflow
        If a scale overflows `dtype`. One that underflows becomes the smallest number.
    """
    if weights is None:
        even = W.new_ones(1, 1, 1, dtype=torch.float32)
        return _find_grids(W, scheme, dtype, FULL_RANGE, [even])[0]
    return find_grids(W, scheme, dtype=dtype, weights=[weights])[0]


def find_grids(
    W: Tensor, scheme: QuantizationArgs, *, dtype: torch.dtype, weights: Sequence[Tensor]
) -> list[Grid]:
    """Return the grid that `find_grid` finds for each of several `weights`, in one search."""
    relative = []
    for each in weights:
        # At most 1, so that sums in float32 do not overflow.
        each = each.double()
        largest = each.max()
        each = each / largest if float(largest) > 0 else torch.ones_like(each)
        relative.append(each.to(W.device).float().view(1, scheme.groups(W.shape[1]), -1))
    return _find_grids(W, scheme, dtype, RANGES, relative)


def _find_grids(
    W: Tensor,
    scheme: QuantizationArgs,
    dtype: torch.dtype,
    ranges: Sequence[float],
    weights: Sequence[Tensor],
) -> list[Grid]:
    """Search some rows at a time; the weights are [1, groups, width] or [1, 1, 1]."""
    check_finite(W, "the matrix")
    most = max(1, NUMBERS.get(W.device.type, W.numel()) // max(W.shape[1], 1))
    groups = scheme.groups(W.shape[1])

    def search(rows: Tensor) -> list[Grid]:
        return _search(rows.double().view(len(rows), groups, -1), scheme, dtype, ranges, weights)

    found = map_in_threads(search, W.split(most), W.device)
    return [
        Grid(
            torch.cat([grid.scale for grid in grids]),
            None
            if scheme.symmetric
            else torch.cat([grid.zero for grid in grids if grid.zero is not None]),
        )
        for grids in zip(*found, strict=True)
    ]


def _search(
    X: Tensor,
    scheme: QuantizationArgs,
    dtype: torch.dtype,
    ranges: Sequence[float],
    weights: Sequence[Tensor],
) -> list[Grid]:
    """Return the grids of some rows [rows, groups, width], one for each of the weights."""
    size = X.abs().amax(dim=2)  # [rows, groups]
    unit = torch.where(size > 0, size, 1)
    relative = (X / unit[:, :, None]).float()
    best = [torch.full_like(unit, torch.inf, dtype=torch.float32) for _ in weights]
    found = [torch.ones_like(unit, dtype=dtype) for _ in weights]
    zero = [torch.zeros_like(unit) for _ in weights]
    for first, (exact, middle) in enumerate(_candidates(X, scheme, ranges)):
        scale = _cast_scale(torch.where(size > 0, exact, 1), dtype)
        if first == 0 and not all_finite(scale):
            raise ScaleOverflow(f"scales up to {float(exact.max()):.3g} overflow {dtype}")
        step = (scale.double() / unit).float()[:, :, None]
        steps = (relative / step).round_()
        if middle is None:
            steps.clamp_(scheme.lowest, scheme.highest)
        else:
            shift = middle.float()[:, :, None]
            steps.add_(shift).clamp_(scheme.lowest, scheme.highest).sub_(shift)
        squares = steps.mul_(step).sub_(relative).square_()
        for number, each in enumerate(weights):
            error = (squares * each).sum(dim=2)
            better = (error < best[number]) & (scale != 0)
            best[number] = torch.where(better, error, best[number])
            found[number] = torch.where(better, scale, found[number])
            if middle is not None:
                zero[number] = torch.where(better, middle, zero[number])
    if scheme.super_blocks:
        return [
            Grid(_common(X, scale, each, scheme), None)
            for scale, each in zip(found, weights, strict=True)
        ]
    return [
        Grid(scale, None if scheme.symmetric else middle.to(torch.int8))
        for scale, middle in zip(found, zero, strict=True)
    ]


def _common(X: Tensor, scale: Tensor, weights: Tensor, scheme: QuantizationArgs) -> Tensor:
    """Return scales [rows, groups] of super-blocks for the numbers X [rows, groups, width]."""
    n_groups = SUPER_BLOCK // X.shape[2]
    blocks = X.unflatten(1, (-1, n_groups))
    size = blocks.abs().amax((2, 3), keepdim=True)
    unit = torch.where(size > 0, size, 1)
    relative = (blocks / unit).flatten(1, 2).float()
    unit = unit.expand(-1, -1, n_groups, 1).flatten(1, 2)  # [rows, groups, 1]

    def error_of(tried: Tensor) -> Tensor:
        step = (tried[:, :, None] / unit).float()
        steps = (relative / step).round_().clamp_(scheme.lowest, scheme.highest)
        squares: Tensor = steps.mul_(step).sub_(relative).square_().mul(weights)
        return squares.sum(dim=2).double()

    # Groups of zeros, which any scale represents, must not determine the common number.
    wanted = torch.where(X.abs().amax(dim=2) > 0, scale.double(), 0)
    return common_scales(wanted, n_groups, largest_multiple(scheme), scale.dtype, error_of)


def round_to_grid(W: Tensor, grid: Grid, scheme: QuantizationArgs) -> Tensor:
    """Return the nearest code of every number of `W` [rows, columns], int8."""
    scale, zero = grid.expand(W.shape[1])
    steps = (W.double() / scale.double()).round_()
    if zero is not None:
        steps += zero
    return steps.clamp_(scheme.lowest, scheme.highest).to(torch.int8)


def check_finite(numbers: Tensor, name: str) -> None:
    """Raise ValueError if a tensor, called `name` in the message, holds infinities or NaN."""
    if not all_finite(numbers):
        raise ValueError(f"{name} {list(numbers.shape)} holds infinities or NaN")


def _candidates(
    X: Tensor, scheme: QuantizationArgs, ranges: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield scales [rows, groups] and, for an asymmetric scheme, zero points."""
    lowest, highest = scheme.lowest, scheme.highest
    low, high = X.amin(dim=2).clamp_max(0), X.amax(dim=2).clamp_min(0)
    if scheme.symmetric:
        size = torch.maximum(high, -low)
        outward = torch.where(high > -low, -size, size)  # maps the largest to the lowest code
        for fraction in ranges:
            yield fraction * size / highest, None
            yield fraction * outward / -lowest, None
        return
    for fraction in ranges:
        scale = fraction * (high - low) / (highest - lowest)
        # A range without zero is extended to zero, and the zero point is then at its end.
        middle = (lowest - fraction * low / torch.where(scale > 0, scale, 1)).round_()
        yield scale, middle.clamp_(lowest, highest)


def _cast_scale(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to `dtype`, with the smallest number in place of zero."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = exact.to(dtype)
    return torch.where(scale == 0, torch.full_like(exact, least).copysign(exact).to(dtype), scale)
