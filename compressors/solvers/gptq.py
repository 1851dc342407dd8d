"""GPTQ: quantization column by column, where later columns compensate for earlier errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.column_quantizer import ColumnQuantizer
from lrc.compressors.solvers.coordinate_descent import PASSES, coordinate_descent
from lrc.compressors.solvers.linalg import add_product_, invert_triangular_, whitening_factor
from lrc.compressors.solvers.quantization_grid import Grid, check_finite, find_grids
from lrc.compressors.solvers.quantized_matrix import (
    QuantizedMatrix,
    better_rows,
    round_to_nearest,
    rounded,
)

QuantizerName = Literal["rtn", "gptq"]

DAMP = 0.01  # of the mean diagonal, as in the paper
SHRINKAGE = 0.05
"""Fraction by which the second moment is moved to its diagonal.

Correlations of inputs are more specific to the calibration text than their sizes. Not tuned: on
five layers of SmolLM2-135M at int4-g64, 0.05, 0.1 and 0.2 did about equally well on other text.
Under H itself 0.05 raises the error of a matrix by 1 % on average, by up to 6 % for some value
projections."""


@dataclass(frozen=True)
class InverseFactor:
    """A triangular factor of the inverse of a second moment H, or of each of a stack of them."""

    order: Tensor
    """[columns], the order in which the columns are quantized."""
    U: Tensor
    """[columns, columns], upper triangular; ``U.T @ U`` is the inverse of H in that order."""
    weights: Tensor
    """[columns], ``1 / [H^-1]_ii``: the least cost of a unit squared error."""
    fallback: str | None = None


def gptq(
    W: Tensor,
    H: Tensor,
    scheme: QuantizationArgs,
    *,
    dtype: torch.dtype,
    damp: float = DAMP,
    shrinkage: float = SHRINKAGE,
    act_order: bool = True,
    passes: int = PASSES,
) -> QuantizedMatrix:
    """Quantize a matrix to minimize ``tr((W - W_q) S (W - W_q)^T)``, with S shrunk from `H`.

    No row has a larger error under S than by `round_to_nearest`.

    Parameters
    ----------
    W : Tensor, shape [rows, columns]
    H : Tensor, shape [columns, columns]
        Second moment of the inputs.
    dtype : torch.dtype
        Dtype of the stored scales.
    damp : float
        Fraction of ``mean(diag(H))`` added to its diagonal.
    shrinkage : float
        Fraction in [0, 1] by which H is moved to its diagonal, see `shrunk`.
    act_order : bool
        Quantize the columns with the largest inputs first.
    passes : int
        Passes of `coordinate_descent` after GPTQ. On SmolLM2-135M three passes lower the error on
        held-out text by 5 % at int4-g64, 6 % at int3-g64, 4 % at int4 and 7 % at
        int4-g64-asymmetric.

    Raises
    ------
    ValueError
        If `H` is not finite or does not fit `W`, and see `find_grid`.

    Notes
    -----
    GPTQ (https://arxiv.org/abs/2210.17323) with grids that are found before, so that groups stay
    contiguous in any order of columns. With ``H^-1 = U^T U``, U upper triangular, the squares of
    the paper's errors ``(w - q) / U_ii`` add up to the objective. A column costs at least
    ``(w - q)^2 / [H^-1]_ii`` however well the others compensate, so this is the weight by which
    grids are chosen; on SmolLM2-135M it leaves 5 to 9 % less error than the diagonal of H.
    """
    check_metric(W, H)
    if not H.diagonal().any():
        nearest = round_to_nearest(W.double(), scheme, dtype=dtype)
        return replace(nearest, fallback="inputs were all zero; rounded to nearest")
    start, inverse = _start(
        W, H, scheme, dtype=dtype, damp=damp, shrinkage=shrinkage, act_order=act_order
    )
    codes = propagate_error(start.W, inverse, *start.grid.expand(W.shape[1]), scheme)
    del inverse  # as large as H
    found = QuantizedMatrix(codes, start.grid.scale, start.grid.zero, scheme)
    found = coordinate_descent(start.W, start.H, found, damp=damp, passes=passes)
    return replace(better_rows(start.W, start.H, found, start.nearest), fallback=start.fallback)


def gptq_together(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    scheme: QuantizationArgs,
    *,
    dtype: torch.dtype,
    damp: float = DAMP,
    shrinkage: float = SHRINKAGE,
    act_order: bool = True,
    passes: int = PASSES,
) -> list[QuantizedMatrix]:
    """Quantize matrices of equal shape as `gptq` does, the same column of all of them at a time.

    On a GPU, a column of many small matrices takes hardly longer than that of one.

    Parameters
    ----------
    weights : sequence of Tensor, each of shape [rows, columns]
    moments : sequence of Tensor, each of shape [columns, columns]
        Second moment of the inputs of each matrix; none may be zero.
    scheme, dtype, damp, shrinkage, act_order, passes
        As for `gptq`.

    Raises
    ------
    ValueError
        As `gptq`, if this holds for any of the matrices.
    """
    starts, inverses = [], []
    for W, H in zip(weights, moments, strict=True):
        check_metric(W, H)
        start, inverse = _start(
            W, H, scheme, dtype=dtype, damp=damp, shrinkage=shrinkage, act_order=act_order
        )
        starts.append(start)
        inverses.append(inverse)

    def stack(part: Callable[[_Start], Tensor]) -> Tensor:
        return torch.stack([part(start) for start in starts])

    inverse = InverseFactor(
        torch.stack([each.order for each in inverses]),
        torch.stack([each.U for each in inverses]),
        torch.stack([each.weights for each in inverses]),
    )
    zero = None
    if not scheme.symmetric:
        zero = torch.stack([start.grid.zero for start in starts if start.grid.zero is not None])
    grid = Grid(stack(lambda start: start.grid.scale), zero)
    W, H = stack(lambda start: start.W), stack(lambda start: start.H)
    codes = propagate_error(W, inverse, *grid.expand(W.shape[-1]), scheme)
    found = QuantizedMatrix(codes, grid.scale, grid.zero, scheme)
    found = coordinate_descent(W, H, found, damp=damp, passes=passes)
    results = []
    for number, start in enumerate(starts):
        zero = None if found.zero is None else found.zero[number]
        own = QuantizedMatrix(found.codes[number], found.scale[number], zero, scheme)
        best = better_rows(start.W, start.H, own, start.nearest)
        results.append(replace(best, fallback=start.fallback))
    return results


@dataclass(frozen=True)
class _Start:
    """What is known of a matrix before the first of its columns is quantized."""

    W: Tensor
    """[rows, columns], float64"""
    H: Tensor
    """[columns, columns], shrunk, float64"""
    grid: Grid
    nearest: QuantizedMatrix
    fallback: str | None


def _start(
    W: Tensor,
    H: Tensor,
    scheme: QuantizationArgs,
    *,
    dtype: torch.dtype,
    damp: float,
    shrinkage: float,
    act_order: bool,
) -> tuple[_Start, InverseFactor]:
    W, H = W.double(), shrunk(H, shrinkage)
    inverse = factor_inverse_hessian(H, damp, act_order=act_order)
    weights = [H.diagonal(), inverse.weights]
    plain, grid = find_grids(W, scheme, dtype=dtype, weights=weights)
    return _Start(W, H, grid, rounded(W, plain, scheme), inverse.fallback), inverse


def shrunk(H: Tensor, shrinkage: float) -> Tensor:
    """Return ``(1 - shrinkage) H + shrinkage diag(H)`` in float64.

    The estimator with the target of unequal variances of Schaefer and Strimmer (2005),
    https://doi.org/10.2202/1544-6115.1175. Unlike damping it does not depend on the scale of the
    channels: a massive one does not make the others look independent.
    """
    result = H.to(torch.float64, copy=True).mul_(1 - shrinkage)
    result.diagonal().copy_(H.diagonal())
    return result


def check_metric(W: Tensor, H: Tensor) -> None:
    """Raise ValueError if `H` is not a finite second moment of the columns of `W`."""
    columns = W.shape[1]
    if H.shape != (columns, columns):
        raise ValueError(
            f"the second moment of {columns} inputs must be [{columns}, {columns}], "
            f"got {list(H.shape)}"
        )
    check_finite(H, "the second moment")


def factor_inverse_hessian(H: Tensor, damp: float, *, act_order: bool = True) -> InverseFactor:
    """Factor the inverse of a damped second moment [columns, columns], float64.

    With `act_order` the columns are in the order of decreasing diagonals.
    """
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    # With the columns reversed, the lower Cholesky factor of H becomes an upper one R of the order,
    # H = R R^T, and U = R^-1. This avoids forming H^-1, which would lose digits.
    backwards = order.flip(0)
    L, fallback = whitening_factor(H[backwards[:, None], backwards], damp)
    inverse = L.mT.flip(0, 1)  # the transpose of R, with contiguous rows
    del L  # of large matrices, few copies fit into memory
    invert_triangular_(inverse)
    U = inverse.mT
    weights = torch.empty_like(H.diagonal())
    weights[order] = torch.linalg.vector_norm(U, dim=0) ** -2
    return InverseFactor(order, U, weights, fallback)


def propagate_error(
    W: Tensor, inverse: InverseFactor, scale: Tensor, zero: Tensor | None, scheme: QuantizationArgs
) -> Tensor:
    """Quantize columns in sequence, and add the error of each to the targets of the later ones.

    `W`, `scale` and `zero`, the zero points, are [..., rows, columns]; so are the codes returned,
    in int8. Of a stack of matrices, each has its own inverse.
    """
    quantizer = ColumnQuantizer(scheme, W.device)
    U = inverse.U
    places = inverse.order[..., None].expand(*W.mT.shape)  # [..., columns, rows]
    diagonal = U.diagonal(dim1=-2, dim2=-1)[..., None]
    target, step = (t.mT.gather(-2, places).to(quantizer.dtype) for t in (W, scale))
    middle = None if zero is None else zero.mT.gather(-2, places).to(quantizer.dtype)
    codes = torch.empty_like(target, dtype=torch.int8)
    for start in range(0, target.shape[-2], quantizer.width):
        block = slice(start, start + quantizer.width)
        offset = None if middle is None else middle[..., block, :]
        coupling = (U[..., block, start:] / diagonal[..., block, :]).to(quantizer.dtype)
        within, later = coupling[..., : quantizer.width], coupling[..., quantizer.width :]
        delta, steps = quantizer.quantize(
            target[..., block, :], within, step[..., block, :], offset
        )
        codes[..., block, :] = (steps if offset is None else steps + offset).to(torch.int8)
        add_product_(target[..., block.stop :, :], later.mT, delta)
    return torch.empty_like(codes).scatter_(-2, places, codes).mT.contiguous()


def quantize_matrix(
    W: Tensor,
    H: Tensor | None,
    scheme: QuantizationArgs,
    *,
    quantizer: QuantizerName,
    dtype: torch.dtype,
    damp: float = DAMP,
    act_order: bool = True,
) -> QuantizedMatrix:
    """Quantize a matrix by `gptq`, or by `round_to_nearest`, which also serves if `H` is None.

    The other parameters and the errors are those of `gptq`; an unknown quantizer is a ValueError.
    """
    if quantizer not in get_args(QuantizerName):
        raise ValueError(f"quantizer must be rtn or gptq, got {quantizer!r}")
    if quantizer == "gptq" and H is not None:
        return gptq(W, H, scheme, dtype=dtype, damp=damp, act_order=act_order)
    return round_to_nearest(W, scheme, dtype=dtype, H=H)
