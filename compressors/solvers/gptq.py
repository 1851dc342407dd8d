"""GPTQ: rounding column by column, where the columns to come make up for what has been lost."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.solvers.coordinate_descent import PASSES, descend
from lrc.compressors.solvers.gptq_columns import Columns
from lrc.compressors.solvers.linalg import whitening_factor
from lrc.compressors.solvers.quantization_grid import check_finite, find_grid
from lrc.compressors.solvers.quantized_matrix import Rounded, better_rows
from lrc.compressors.solvers.round_to_nearest import rtn

DAMP = 0.01
"""Of the mean diagonal: the paper's."""


def gptq(
    W: Tensor,
    H: Tensor,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    damp: float = DAMP,
    order: bool = True,
    passes: int = PASSES,
) -> Rounded:
    """Round a matrix so that little of ``tr((W - W_q) H (W - W_q)^T)`` is left.

    Parameters
    ----------
    W : Tensor, shape [rows, columns]
    H : Tensor, shape [columns, columns]
        Second moment of the inputs.
    scheme : Scheme
    dtype : torch.dtype
        Of the scales in the file.
    damp : float
        Fraction of ``mean(diag(H))`` added to its diagonal.
    order : bool
        Round the columns with the largest inputs first.
    passes : int
        Of coordinate descent on codes and scales, from what GPTQ has found.

    Returns
    -------
    Rounded
        No row of it has a larger error than `rtn` leaves.

    Raises
    ------
    ValueError
        If `H` does not fit `W` or holds what is no number, and what `find_grid` says.

    Notes
    -----
    The algorithm of [1]_. Grids are found beforehand, so that the order is one of the solution only
    and groups stay together in the file. With ``H^-1 = U^T U``, U upper triangular, the paper's
    errors ``(w - q) / U_ii`` sum up to the very objective, and a column alone costs at least
    ``(w - q)^2 / [H^-1]_ii`` however well the others make up for it: that is what weighs the errors
    by which the grid is chosen. On SmolLM2-135M it leaves 5 to 9 % less than the diagonal of H
    does, and three passes of descent lower the error on held-out text by 5 % at int4-g64, 6 % at
    int3-g64, 4 % at int4 and 7 % at int4-g64-asymmetric.

    References
    ----------
    .. [1] E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
       Transformers", ICLR 2023. https://arxiv.org/abs/2210.17323
    """
    check_metric(W, H)
    W, H = W.double(), H.double()
    if not H.diagonal().any():
        nearest = rtn(W, scheme, dtype=dtype)
        return replace(nearest, fallback="inputs were all zero; rounded to nearest")
    nearest = rtn(W, scheme, dtype=dtype, H=H)
    solution = solve_order(H, damp, order=order)
    grid = find_grid(W, scheme, dtype=dtype, weights=solution.weights)
    codes = feed_back(W, solution.U, *grid.spread(W.shape[1]), scheme, solution.order)
    rounded = Rounded(codes, grid.scale, grid.zero, scheme, solution.fallback)
    rounded = descend(W, H, rounded, damp=damp, passes=passes)
    return better_rows(W, H, rounded, nearest)


def feed_back(
    W: Tensor, U: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, order: Tensor
) -> Tensor:
    """Round `W` column by column, the later columns making up for the earlier ones.

    Parameters
    ----------
    W : Tensor, shape [rows, columns]
    U : Tensor, shape [columns, columns]
        Of `solve_order`, with the columns in order.
    scale : Tensor, shape [rows, columns]
    zero : Tensor, shape [rows, columns], optional
    scheme : Scheme
    order : Tensor, shape [columns]
        The columns in the order in which they are rounded.

    Returns
    -------
    Tensor, shape [rows, columns], int8
        Codes.
    """
    columns = Columns(scheme, W.device)
    pull = (U / U.diagonal()[:, None]).to(columns.dtype)
    wanted, step = (t.T[order].to(columns.dtype) for t in (W, scale))  # [columns, rows]
    middle = None if zero is None else zero.T[order].to(columns.dtype)
    codes = torch.empty_like(wanted, dtype=torch.int8)
    for start in range(0, len(wanted), columns.width):
        block = slice(start, start + columns.width)
        offset = None if middle is None else middle[block]
        moves, steps = columns.round(wanted[block], pull[block, block], step[block], offset)
        codes[order[block]] = (steps if offset is None else steps + offset).to(torch.int8)
        wanted[block.stop :].addmm_(pull[block, block.stop :].T, moves)
    return codes.T.contiguous()


def check_metric(W: Tensor, H: Tensor) -> None:
    """Raise ValueError if `H` is no second moment of the columns of `W`."""
    columns = W.shape[1]
    if H.shape != (columns, columns):
        raise ValueError(
            f"the second moment of {columns} inputs must be [{columns}, {columns}], "
            f"got {list(H.shape)}"
        )
    check_finite(H, "the second moment")


@dataclass(frozen=True)
class Solution:
    """What the feedback from column to column needs to know of the inputs."""

    order: Tensor
    """[columns], in which they are rounded."""
    U: Tensor
    """[columns, columns], upper triangular, ``U.T @ U`` the inverse of H with columns in order."""
    weights: Tensor
    """[columns], what a squared error costs at least, ``1 / [H^-1]_ii``."""
    fallback: str | None


def solve_order(H: Tensor, damp: float, *, order: bool = True) -> Solution:
    """Factor the inverse of the damped `H` [columns, columns], largest inputs first if `order`."""
    where = torch.arange(len(H), device=H.device)
    if order:
        where = H.diagonal().argsort(descending=True, stable=True)
    # Of the columns in reverse, the lower factor of H is the upper R with H = R R^T, and U its
    # inverse: that of H, which loses digits, is never formed.
    L, fallback = whitening_factor(H[where][:, where].flip(0, 1), damp)
    R = L.flip(0, 1)
    U = torch.linalg.solve_triangular(R, torch.eye(len(H)).to(R), upper=True)
    weights = torch.empty_like(H.diagonal())
    weights[where] = 1 / U.square().sum(dim=0)
    return Solution(where, U, weights, fallback)
