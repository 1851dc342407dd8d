"""GPTQ: rounding column by column, where the columns to come make up for what has been lost."""

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.linalg import whitening_factor
from lrc.compressors.quantize.grid import check_finite, find_grid
from lrc.compressors.quantize.rounded import Rounded, better_rows
from lrc.compressors.quantize.rtn import rtn
from lrc.compressors.quantize.sweep import Sweep

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
        return nearest
    order_ = _order(H, order)
    U, fallback = inverse_factor(H[order_][:, order_], damp)
    weights = torch.empty_like(H.diagonal())
    weights[order_] = 1 / U.square().sum(dim=0)
    grid = find_grid(W, scheme, dtype=dtype, weights=weights)
    pull = U / U.diagonal()[:, None]
    codes = Sweep(grid, scheme, order_).run(W.T[order_], pull)
    rounded = Rounded(codes, grid.scale, grid.zero, scheme, fallback)
    return better_rows(W, H, rounded, nearest)


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
