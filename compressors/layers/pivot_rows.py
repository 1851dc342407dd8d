"""Lossless storage of a low-rank product: some of its rows, and the others as combinations of them.

A matrix of rank r has r independent rows; every other row is a combination of these. The rows and
the coefficients are ``r (d_out + d_in - r)`` numbers, where two factors are ``r (d_out + d_in)``.
PIFA (https://arxiv.org/abs/2501.19090) introduced this for language models; in linear algebra it is
the interpolative decomposition.
"""

from contextlib import suppress
from math import isfinite

import torch
from torch import Tensor
from torch.backends.cuda import preferred_linalg_library

from lrc.compressors.io.finite import all_finite

# Largest coefficient, so that rounding the coefficients to 16 bits is harmless. Relative error of
# the product in bfloat16, for spectra and metrics with condition numbers up to 1e6:
#
#                             factors    LU alone   bound 2    1.5        1.1        pivoted QR
#   [576, 576] of rank 318    0.2-0.4 %  0.2-1.1 %  0.2-0.9 %  0.2-0.9 %  0.2-0.7 %  0.2-0.8 %
#   [1536, 576] of rank 436   0.3 %      1.2-1.4 %  1.2-1.3 %  1.1-1.2 %  0.9 %
#   swaps after LU                                  0-2        0-8        5-38
#
# Pivoted QR takes 40 times as long as LU. The bound is for matrices on which elimination grows
# without limit; a bound of 2 prevents that at almost no cost.
BOUND = 2.0
# Swaps update the coefficients. A hundred updates of moderate coefficients cause errors of 1e-12,
# while the file stores 16 bits. After more swaps or large coefficients the system is solved again.
MAX_SWAPS, MAX_SOLUTIONS = 100, 5
MODERATE = 1e3


class NoPivotRows(ValueError):
    """Factors of a valid shape that have no usable pivot rows."""


def pivot_rows(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write ``B @ A`` as its pivot rows and the coefficients of the others.

    Parameters
    ----------
    B : Tensor, shape [d_out, rank]
        Left factor, of full column rank.
    A : Tensor, shape [rank, d_in]
        Right factor.

    Returns
    -------
    R : Tensor, shape [rank, d_in], float64
        The pivot rows of the product.
    C : Tensor, shape [d_out - rank, rank], float64
        Coefficients: row i of the remaining rows is ``C[i] @ R``; no entry above `BOUND`.
    order : Tensor, shape [d_out], int64
        Row j of the product is row ``order[j]`` of ``cat([R, C @ R])``. It ascends among the pivot
        rows and among the others, so that neighbours stay close when outputs are put in order.

    Raises
    ------
    NoPivotRows
        If B is not finite or numerically rank-deficient, or if no pivot rows within the bound are
        found.
    ValueError
        If B has fewer rows than columns.

    Notes
    -----
    Pivots come from LU with partial pivoting, ``B[rows] = L @ U``. U cancels in the coefficients,
    ``B[rest] @ B[pivots]^-1 = L[rest] @ L[pivots]^-1``, so the scales of the columns of B, which
    differ by orders of magnitude, do not matter. Pivots are then swapped with rows that have a
    coefficient above the bound. Every swap multiplies the volume ``|det B[pivots]|`` by that
    coefficient, so the procedure terminates (maxvol: Goreinov et al., "How to find a good
    submatrix", 2010).
    """
    d_out, rank = B.shape
    if d_out < rank:
        raise ValueError(f"rank must be at most the number of rows, {d_out}, got {rank}")
    B, A = B.double(), A.double()
    L, rows = _lower_factor(B)  # [d_out, rank] in the order of `rows`, pivots first
    here = torch.arange(d_out, device=B.device)  # rows of L: pivots, then the others
    C = torch.linalg.solve_triangular(
        L[:rank], L[rank:], upper=False, left=False, unitriangular=True
    )  # [d_out - rank, rank]
    for _ in range(MAX_SOLUTIONS):
        moderate = not len(C) or float(C.abs().max()) <= MODERATE
        if _exchange_(here, C) and moderate:
            break
        C = torch.linalg.solve(L[here[:rank]], L[here[rank:]], left=False)
    else:
        raise NoPivotRows(f"no pivot rows with coefficients up to {BOUND} were found")
    rows = rows[here]
    pivots, columns = rows[:rank].sort()
    others, along = rows[rank:].sort()
    rows, C = torch.cat([pivots, others]), C[along][:, columns]
    order = torch.empty_like(rows)
    order[rows] = torch.arange(d_out, device=B.device)
    return B[pivots] @ A, C, order


def _lower_factor(B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit lower factor of LU with partial pivoting, and the order of the rows."""
    d_out, rank = B.shape
    if not all_finite(B):
        raise NoPivotRows("the factors must be finite, got infinities or NaN")
    LU, swaps = _lu_factor(B)
    # What elimination leaves of a linearly dependent column is rounding error.
    rounding = d_out * torch.finfo(B.dtype).eps * B.abs().amax(dim=0)  # [rank]
    dependent = int((LU.diagonal().abs() <= rounding).sum())
    if dependent:
        raise NoPivotRows(
            f"the left factor [{d_out}, {rank}] must have full column rank, got numerical rank "
            f"{rank - dependent}"
        )
    rows = list(range(d_out))
    for k, other in enumerate((swaps - 1).tolist()):  # LAPACK counts from 1
        rows[k], rows[other] = rows[other], rows[k]
    L = LU.tril(-1)
    L.diagonal().fill_(1)
    return L, torch.tensor(rows, device=B.device)


def _lu_factor(B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors [d_out, rank] of LU with partial pivoting, and the swaps [rank].

    On a GPU, PyTorch factors matrices that are not square with a routine of MAGMA for batches of
    small ones, which is slow for a single large one and prints a warning for each.
    """
    before = preferred_linalg_library()
    if B.is_cuda:
        with suppress(RuntimeError):  # PyTorch was built without cuSOLVER
            preferred_linalg_library("cusolver")
    try:
        LU, swaps, _ = torch.linalg.lu_factor_ex(B)
    finally:
        if B.is_cuda:
            preferred_linalg_library(before)
    return LU, swaps


def _exchange_(here: Tensor, C: Tensor) -> bool:
    """Swap rows into the pivots; return whether all coefficients are within the bound.

    `here` [d_out], pivots first, and `C` [d_out - rank, rank] are updated in place.
    """
    rank = C.shape[1]
    if not len(C):
        return True
    for _ in range(MAX_SWAPS):
        i, j = divmod(int(C.abs().argmax()), rank)  # returns the position of a NaN if there is one
        value = float(C[i, j])
        if not isfinite(value):
            raise NoPivotRows("no pivot rows were found, because elimination overflows")
        if abs(value) <= BOUND:
            return True
        # Row i of the others becomes pivot j: a Sherman-Morrison update of the coefficients.
        column, row = C[:, j].clone(), C[i].clone()
        column[i] += 1
        row[j] -= 1
        C.addr_(column, row, alpha=-1 / value)
        here[[j, rank + i]] = here[[rank + i, j]]
    return False
