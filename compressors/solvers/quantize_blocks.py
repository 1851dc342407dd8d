"""Integers of which whole groups are removed: those that matter least, the rest made to fit."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.compressors.layers.group_sparse import GroupSparse
from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.solvers.block_search import choose_groups, largest, masked
from lrc.compressors.solvers.coordinate_descent import descend
from lrc.compressors.solvers.gptq import DAMP, check_metric, feed_back, solve_order
from lrc.compressors.solvers.quantization_grid import check_finite, find_grid
from lrc.compressors.solvers.quantized_matrix import Rounded, better_rows
from lrc.compressors.solvers.round_to_nearest import rtn

# The scale of a group that is not kept: whatever its numbers want to be, their codes are zero.
NEVER = 1e30


@dataclass(frozen=True)
class GroupSparseWeight:
    """The kept groups of a weight as integers, at the precision of the file."""

    codes: Tensor
    """[groups, width], int8, row after row."""
    scale: Tensor
    """[groups]"""
    mask: Tensor
    """[rows, groups a row], True where a group is kept."""
    scheme: Scheme
    fallback: str | None = None
    """What had to deviate from the request, None if nothing."""

    def weight(self) -> Tensor:
        """Return the matrix [rows, columns] that the file stands for, in float64."""
        numbers = self.codes * self.scale.double()[:, None]
        whole = numbers.new_zeros(*self.mask.shape, numbers.shape[1])
        return whole.masked_scatter(self.mask[:, :, None], numbers).flatten(1)

    def encode(self) -> dict[str, Tensor]:
        """Write it as the tensors of the file."""
        return GroupSparse.encode(self.codes, self.scale, self.mask, self.scheme)


def round_groups(
    W: Tensor,
    H: Tensor | None,
    groups: int,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    damp: float = DAMP,
    order: bool = True,
) -> GroupSparseWeight:
    """Keep some groups of a matrix, and round them so that little of its output is lost.

    Minimised is ``tr((W - W_q) H (W - W_q)^T)``. The groups that cost least are removed, over the
    whole matrix; the others are refitted, rounded one column after another as in GPTQ with what is
    removed staying zero, and improved by coordinate descent on codes and scales.

    Parameters
    ----------
    W : Tensor, shape [rows, columns]
    H : Tensor, shape [columns, columns], or None
        Second moment of the inputs. Where it is not known, or zero, the groups of the largest norm
        are kept and rounded to nearest.
    groups : int
        How many are kept, in ``[1, rows * columns / group size]``.
    scheme : Scheme
        Symmetric, with a group size.
    dtype : torch.dtype
        Of the scales in the file.
    damp : float
        Fraction of ``mean(diag(H))`` added to its diagonal.
    order : bool
        Round the columns with the largest inputs first.

    Returns
    -------
    GroupSparseWeight
        No row of it has a larger error than its refitted groups rounded to nearest.

    Raises
    ------
    ValueError
        If `groups` is out of range, if `H` does not fit `W`, and what `find_grid` says.

    Notes
    -----
    The form is that of [1]_, which ranks groups by a metric of the Hessian too. Ours is the exact
    rise of the error when one group is removed and all others make up for it, as in [2]_ for single
    weights, and then swaps what a refit says is better swapped. In place of the first stage of
    [1]_, which trains the weights of a block by gradients, stand a closed-form refit of each
    matrix and GPTQ. Its second, which tunes the scales end to end by back-propagation with the
    integers frozen, is missing.

    References
    ----------
    .. [1] C. Zeng et al., "GQSA: Group Quantization and Sparsity for Accelerating Large Language
       Model Inference", 2024. https://arxiv.org/abs/2412.17560
    .. [2] B. Hassibi and D. Stork, "Second order derivatives for network pruning: Optimal Brain
       Surgeon", NIPS 1992.
    """
    check_finite(W, "the matrix")
    rows, columns = W.shape
    a_row = scheme.groups(columns)
    if not 1 <= groups <= rows * a_row:
        raise ValueError(
            f"groups must be in [1, {rows * a_row}] for [{rows}, {columns}], got {groups}"
        )
    W = W.double()
    if H is not None:
        check_metric(W, H)
    if H is None or not H.diagonal().any():
        why = "saw no calibration token" if H is None else "inputs were all zero"
        mask = largest(W.view(rows, a_row, -1).square().sum(dim=2), groups)
        nearest = rtn(masked(W, mask), scheme, dtype=dtype)
        return _kept(nearest, mask, f"{why}: groups kept by norm, rounded to nearest")
    H = H.double()
    W_hat, mask = choose_groups(W, H, groups, a_row, damp=damp)
    nearest = rtn(W_hat, scheme, dtype=dtype, H=H)
    solution = solve_order(H, damp, order=order)
    grid = find_grid(W_hat, scheme, dtype=dtype, weights=solution.weights)
    never = min(NEVER, torch.finfo(dtype).max)
    grid = replace(grid, scale=torch.where(mask, grid.scale, never))
    codes = feed_back(W_hat, solution.U, *grid.spread(columns), scheme, solution.order)
    rounded = descend(W, H, Rounded(codes, grid.scale, None, scheme), damp=damp)
    return _kept(better_rows(W, H, rounded, nearest), mask, solution.fallback)


def _kept(rounded: Rounded, mask: Tensor, fallback: str | None) -> GroupSparseWeight:
    """Take the kept groups out of a whole matrix."""
    codes = rounded.codes.view(*mask.shape, -1)[mask]
    return GroupSparseWeight(codes, rounded.scale[mask], mask, rounded.scheme, fallback)
