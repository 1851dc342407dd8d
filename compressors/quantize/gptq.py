"""GPTQ: rounding column by column, where the columns to come make up for what has been lost."""

from dataclasses import replace

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.linalg import whitening_factor
from lrc.compressors.quantize.columns import Columns
from lrc.compressors.quantize.descent import PASSES, descend
from lrc.compressors.quantize.grid import Grid, check_finite, find_grid
from lrc.compressors.quantize.rounded import Rounded, better_rows
from lrc.compressors.quantize.rtn import rtn

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
    by which the grid is chosen. On SmolLM2-135M it leaves a tenth less than the diagonal of H.

    References
    ----------
    .. [1] E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
       Transformers", ICLR 2023. https://arxiv.org/abs/2210.17323
    """
    check_metric(W, H)
    W, H = W.double(), H.double()
    nearest = rtn(W, scheme, dtype=dtype, H=H)
    if not H.diagonal().any():
        return replace(nearest, fallback="inputs were all zero; rounded to nearest")
    order_ = _order(H, order)
    U, fallback = inverse_factor(H[order_][:, order_], damp)
    weights = torch.empty_like(H.diagonal())
    weights[order_] = 1 / U.square().sum(dim=0)
    grid = find_grid(W, scheme, dtype=dtype, weights=weights)
    rounded = feed_back(W, U, grid, scheme, order_)
    rounded = descend(W, H, rounded, damp=damp, passes=passes)
    return better_rows(W, H, replace(rounded, fallback=fallback), nearest)


def feed_back(W: Tensor, U: Tensor, grid: Grid, scheme: Scheme, order: Tensor) -> Rounded:
    """Round `W` column by column, the later columns making up for the earlier ones.

    Parameters
    ----------
    W : Tensor, shape [rows, columns], float64
    U : Tensor, shape [columns, columns]
        Of `inverse_factor`, with the columns in order.
    grid : Grid
    scheme : Scheme
    order : Tensor, shape [columns]
        The columns in the order in which they are rounded.
    """
    columns = Columns(scheme, W.device)
    pull = (U / U.diagonal()[:, None]).to(columns.dtype)
    wanted = W.T[order].to(columns.dtype)  # [columns, rows]
    scale, zero = grid.spread(W.shape[1], columns.dtype)
    scale, zero = scale.T[order], None if zero is None else zero.T[order]
    codes = torch.empty_like(wanted, dtype=torch.int8)
    for start in range(0, len(wanted), columns.width):
        block = slice(start, start + columns.width)
        offset = None if zero is None else zero[block]
        moves, steps = columns.round(wanted[block], pull[block, block], scale[block], offset)
        codes[order[block]] = (steps if offset is None else steps + offset).to(torch.int8)
        wanted[block.stop :].addmm_(pull[block, block.stop :].T, moves)
    return Rounded(codes.T.contiguous(), grid.scale, grid.zero, scheme)


def check_metric(W: Tensor, H: Tensor) -> None:
    """Raise ValueError if `H` is no second moment of the columns of `W`."""
    columns = W.shape[1]
    if H.shape != (columns, columns):
        raise ValueError(
            f"the second moment of {columns} inputs must be [{columns}, {columns}], "
            f"got {list(H.shape)}"
        )
    check_finite(H, "the second moment")


def inverse_factor(H: Tensor, damp: float) -> tuple[Tensor, str | None]:
    """Return the upper triangular U with ``U.T @ U`` the inverse of the damped `H`, and a note."""
    # Of the columns in reverse the lower factor is the upper one with U = R^-1, H = R R^T: the
    # inverse itself, which loses digits, is never formed.
    L, fallback = whitening_factor(H.flip(0, 1), damp)
    R = L.flip(0, 1)
    return torch.linalg.solve_triangular(R, torch.eye(len(H)).to(R), upper=True), fallback


def _order(H: Tensor, order: bool) -> Tensor:
    if order:
        return H.diagonal().argsort(descending=True, stable=True)
    return torch.arange(len(H), device=H.device)
