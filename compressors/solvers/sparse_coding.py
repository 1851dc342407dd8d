"""Sparse codes: which coefficients of a column may differ from zero, and the best values for them.

The problem that every dictionary solver gets is plain least squares, ``min ||Z - D @ S||_F`` with
`nonzeros` coefficients in every column of S. Nothing here loops over columns or atoms: all is
matrix products and element-wise work, the same on a CPU and on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import whitening_factor

Pattern = Literal["unstructured", "2:4"]


@dataclass(frozen=True)
class Code:
    """What a solver found: ``Z ~ D @ S``, where S may be used, and the energy after each round."""

    D: Tensor
    S: Tensor
    mask: Tensor
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """A weight made ready for a solver: whitened, turned into its own eigenbasis and scaled.

    `Z` [dim, d_out] has orthogonal rows, those of largest energy first, so that the first columns
    of the identity are its leading left singular vectors. `lengths` [dim] are the Euclidean
    lengths of its basis vectors before whitening. `columns` gives chosen columns of the original
    weight ``W^T`` as vectors of this space. `start` is what was found at larger sizes, from which a
    solver may go on; it has at least `atoms` atoms.
    """

    Z: Tensor
    lengths: Tensor
    columns: Callable[[Tensor], Tensor]
    atoms: int
    nonzeros: int
    rounds: int
    pattern: Pattern = "unstructured"
    seed: int = 0
    start: Code | None = None


def energy(Z: Tensor, D: Tensor, S: Tensor) -> float:
    """Return ``||Z - D @ S||_F^2``, summed in float64."""
    return float((Z - D @ S).square_().sum(dtype=torch.float64))


def support(score: Tensor, nonzeros: int, pattern: Pattern = "unstructured") -> Tensor:
    """Choose the coefficients of highest score in every column.

    Parameters
    ----------
    score : Tensor, shape [atoms, columns]
        Not negative.
    nonzeros : int
        How many of a column are kept, exactly; of equal scores an arbitrary one.
    pattern : {"unstructured", "2:4"}
        With ``"2:4"`` the two highest of every four consecutive atoms, which makes half of them.

    Returns
    -------
    Tensor, shape [atoms, columns]
        Boolean.

    Notes
    -----
    `torch.topk` selects along the last dimension without sorting. On a GPU with thousands of atoms
    a bisection on one threshold a column would read the scores fewer times.
    """
    if pattern == "2:4":
        return _two_of_four(score)
    kept = score.T.contiguous().topk(nonzeros, dim=1, sorted=False).indices  # [columns, nonzeros]
    mask = torch.zeros(score.T.shape, dtype=torch.bool, device=score.device)
    return mask.scatter_(1, kept, True).T.contiguous()


def _two_of_four(score: Tensor) -> Tensor:
    fours = score.reshape(score.shape[0] // 4, 4, -1)  # [atoms / 4, 4, columns]
    beaten = torch.zeros(fours.shape, dtype=torch.int8, device=score.device)
    for i in range(4):
        for j in range(i):
            later = fours[:, i] > fours[:, j]  # of equal scores the earlier atom wins
            beaten[:, j] += later
            beaten[:, i] += ~later
    return (beaten < 2).reshape(score.shape)


def folded(atoms: int) -> Tensor:
    """Order atoms, given by falling energy, so that every four hold one of each quarter.

    Under 2:4 the atoms of one group compete with each other. In plain order the four strongest
    would, and every column would lose two of them.
    """
    quarters = torch.arange(atoms).reshape(4, atoms // 4)
    quarters[1::2] = quarters[1::2].flip(1)
    return quarters.T.reshape(-1)


def refit_codes(C: Tensor, A: Tensor, S: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Improve the values of S, supports held, by conjugate gradients on all columns at once.

    Parameters
    ----------
    C : Tensor, shape [atoms, atoms]
        Gram matrix ``D.T @ D``.
    A : Tensor, shape [atoms, columns]
        Correlations ``D.T @ Z``.
    S : Tensor, shape [atoms, columns]
        Start; zero outside `mask`.
    mask : Tensor, shape [atoms, columns]
        The support of every column.
    steps : int
        One product ``C @ S`` each.
    """
    R = (A - C @ S) * mask  # [atoms, columns], minus half the gradient
    P = R
    energies = R.square().sum(0)  # [columns]
    # Below this a gradient is rounding, and following it would blow up dependent atoms.
    floor = (16 * torch.finfo(S.dtype).eps) ** 2 * (A * mask).square().sum(0)
    for _ in range(steps):
        CP = (C @ P).mul_(mask)
        bend = (P * CP).sum(0)  # [columns]
        live = (energies > floor) & (bend > 0)
        step = torch.where(live, energies / bend, 0.0)
        S = S + step * P
        R = R - step * CP
        new = R.square().sum(0)
        P = R + torch.where(live, new / energies, 0.0) * P
        energies = new
    return S


def refit_dictionary(Z: Tensor, D: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the dictionary by the least-squares one for the codes S, atoms at unit length.

    Parameters
    ----------
    Z : Tensor, shape [dim, columns]
    D : Tensor, shape [dim, atoms]
        The dictionary so far.
    S : Tensor, shape [atoms, columns]

    Returns
    -------
    D : Tensor, shape [dim, atoms]
        Atoms that no column uses stay as they were.
    S : Tensor, shape [atoms, columns]
        Rescaled, so that the product is not touched by the unit lengths.

    Notes
    -----
    The method of optimal directions, written as a correction:
    ``D + (Z - D S) S^T (S S^T + ridge)^{-1}``. The ridge, needed for rows of S that are unused or
    dependent, then only shortens the step: the error never rises. The rows are scaled to unit
    length first, or rounding of the strongest would be larger than the weakest.
    """
    size = S.norm(dim=1).clamp_min(torch.finfo(S.dtype).tiny)  # [atoms]
    T = S / size[:, None]
    M = (T @ T.T).double()  # [atoms, atoms]
    # What the factor falls back on is more ridge still, of no more consequence.
    L, _ = whitening_factor(M, torch.finfo(Z.dtype).eps ** 0.75)
    step = torch.cholesky_solve((T @ (Z - D @ S).T).double(), L)  # [atoms, dim]
    D, length = unit_atoms(D + step.T.to(D.dtype) / size)
    return D, S * length[:, None]


def unit_atoms(D: Tensor) -> tuple[Tensor, Tensor]:
    """Divide atoms by their lengths [atoms] and return both; one of zero length stays."""
    length = D.norm(dim=0)
    length = torch.where(length > 0, length, torch.ones_like(length))
    return D / length, length
