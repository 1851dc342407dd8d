"""Sparse coding: the support of every column of the coefficients, and the best values on it.

All dictionary solvers minimize ``||Z - D @ S||_F`` with `nonzeros` coefficients in every column of
S. There are no loops over columns or atoms, only matrix products and element-wise operations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.solvers.conjugate_gradients import conjugate_gradients
from lrc.compressors.solvers.linalg import whitening_factor
from lrc.compressors.solvers.masks import Pattern, largest_of_groups


@dataclass(frozen=True)
class SparseCode:
    """The result of a solver, ``Z ~ D @ S``."""

    D: Tensor
    """[dim, atoms], atoms of unit length."""
    S: Tensor
    """[atoms, d_out]"""
    mask: Tensor
    """[atoms, d_out], the support of S."""
    errors: tuple[float, ...]
    """Lowest squared error so far after each round."""


@dataclass(frozen=True)
class SparseCodingTask:
    """A weight that has been whitened, written in its own eigenbasis and scaled, for a solver."""

    Z: Tensor
    """[dim, d_out], orthogonal rows in order of energy: the first columns of the identity are the
    leading left singular vectors."""
    lengths: Tensor
    """[dim], Euclidean lengths of the basis vectors before whitening."""
    columns: Callable[[Tensor], Tensor]
    """Returns the given columns of the original weight ``W^T`` as vectors of this space."""
    atoms: int
    nonzeros: int
    rounds: int
    pattern: Pattern = "unstructured"
    seed: int = 0
    start: SparseCode | None = None
    """A solution with at least `atoms` atoms, from which a solver may continue."""


def squared_error(Z: Tensor, D: Tensor, S: Tensor) -> float:
    """Return ``||Z - D @ S||_F^2``, summed in float64."""
    return float((Z - D @ S).square_().sum(dtype=torch.float64))


def support(score: Tensor, nonzeros: int, pattern: Pattern = "unstructured") -> Tensor:
    """Select the `nonzeros` coefficients of highest score in every column, as a mask.

    `score` [atoms, columns] is not negative; ties are broken arbitrarily. With the pattern "2:4"
    the two highest of every four consecutive atoms are selected, which makes half of them.
    """
    if pattern == "2:4":
        return largest_of_groups(score, 2, 4, 0)
    kept = score.T.contiguous().topk(nonzeros, dim=1, sorted=False).indices  # [columns, nonzeros]
    mask = torch.zeros(score.T.shape, dtype=torch.bool, device=score.device)
    return mask.scatter_(1, kept, True).T.contiguous()


def interleaved(atoms: int) -> Tensor:
    """Return an order of atoms in which every four contain one of each quarter.

    Under the pattern 2:4 the atoms of a group compete. With atoms in order of energy, the four
    strongest would be in one group, and every column would lose two of them.
    """
    quarters = torch.arange(atoms).reshape(4, atoms // 4)
    quarters[1::2] = quarters[1::2].flip(1)
    return quarters.T.reshape(-1)


def refit_codes(C: Tensor, A: Tensor, S: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Improve the values of S on a fixed support, by conjugate gradients on all columns at once.

    `C` [atoms, atoms] is the Gram matrix ``D.T @ D``, `A` are the correlations ``D.T @ Z``. The
    starting point S is zero outside `mask`. `A`, `S` and `mask` are [atoms, columns].
    """
    # A smaller gradient is a rounding error; steps along it would diverge for dependent atoms.
    floor = (16 * torch.finfo(S.dtype).eps) ** 2 * (A * mask).square().sum(0, keepdim=True)
    return conjugate_gradients(
        lambda P: (C @ P).mul_(mask), S, (A - C @ S) * mask, steps=steps, dim=0, floor=floor
    )[0]


def refit_dictionary(Z: Tensor, D: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the dictionary D [dim, atoms] by the least-squares solution for the codes S.

    Returns atoms of unit length and S [atoms, columns], rescaled for them. Unused atoms are
    unchanged.

    Notes
    -----
    The method of optimal directions in the form ``D + (Z - D S) S^T (S S^T + ridge)^{-1}``. The
    ridge, needed for rows of S that are unused or dependent, only shortens the step: the error
    never rises. The rows are normalized first so that rounding errors are relative to each row.
    """
    size = S.norm(dim=1).clamp_min(torch.finfo(S.dtype).tiny)  # [atoms]
    T = S / size[:, None]
    M = (T @ T.T).double()  # [atoms, atoms]
    # A fallback of the factorization only increases the ridge.
    L, _ = whitening_factor(M, torch.finfo(Z.dtype).eps ** 0.75)
    step = torch.cholesky_solve((T @ (Z - D @ S).T).double(), L)  # [atoms, dim]
    D, length = normalize_atoms(D + step.T.to(D.dtype) / size)
    return D, S * length[:, None]


def normalize_atoms(D: Tensor) -> tuple[Tensor, Tensor]:
    """Divide atoms [dim, atoms] by their lengths [atoms], except zeros, and return both."""
    length = D.norm(dim=0)
    length = torch.where(length > 0, length, torch.ones_like(length))
    return D / length, length
