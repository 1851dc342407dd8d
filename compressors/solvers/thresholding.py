"""Fast dictionary solvers: supports by thresholding, values by least squares.

If every column uses half of the atoms, the greedy pursuit of CoSpaDi takes hundreds of sequential
steps per column. Thresholding selects all coefficients at once.
"""

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import descending_eigh, numerical_rank
from lrc.compressors.solvers.sparse_coding import (
    SparseCode,
    SparseCodingTask,
    interleaved,
    normalize_atoms,
    refit_codes,
    refit_dictionary,
    squared_error,
    support,
)

# Length of the gradient step before thresholding, in the first and the last round: 15 % less error
# than 1 throughout, on Gaussian weights [1536, 576] with power-law inputs.
FIRST_STEP, LAST_STEP = 4.0, 1.0
# Conjugate-gradient steps per round; because of the warm start, 10 change the result by < 0.1 %.
CODE_STEPS = 3
# Rounds with an orthogonal dictionary, which are cheaper, before hard-thresholding pursuit.
START_ROUNDS = 5
# Newton iterations from errors of up to 1e-1, in nearly dependent directions, to rounding.
NEWTON_STEPS = 4
# Final rounds with fixed supports, and the conjugate-gradient steps of each.
FINAL_ROUNDS, FINAL_STEPS = 3, 4


def rocket(task: SparseCodingTask) -> SparseCode:
    """Threshold the code in the eigenbasis once, then fit the dictionary to it.

    The factorization of ROCKET (https://arxiv.org/abs/2602.11008): importance
    ``|c_ij| * ||L^{-1} b_i||^0.5`` of coefficient j on eigenvector i, then a ridge least-squares
    dictionary. The paper then redistributes 0.5 % of the coefficients over the columns; here every
    column has the same number.
    """
    Z, k = task.Z, task.atoms
    S = Z[:k]  # the code in the eigenbasis
    mask = support(S.abs() * task.lengths[:k, None].sqrt(), task.nonzeros, task.pattern)
    D, S = refit_dictionary(Z, _axes(Z, torch.arange(k)), S * mask)
    return SparseCode(D, S, mask, (squared_error(Z, D, S),))


def compot(task: SparseCodingTask) -> SparseCode:
    """Alternate exact codes for an orthogonal dictionary and the best orthogonal dictionary.

    The factorization of COMPOT (https://arxiv.org/abs/2602.15200), followed by one least-squares
    update of the dictionary, which need not be orthogonal once the codes are fixed.
    """
    D, errors = _orthogonal(task, task.rounds)
    S, mask = orthogonal_codes(task, D)
    D, S = refit_dictionary(task.Z, D, S)
    return SparseCode(D, S, mask, (*errors[:-1], min(errors[-1], squared_error(task.Z, D, S))))


def orthogonal_codes(task: SparseCodingTask, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best codes [atoms, d_out] for orthonormal atoms D [dim, atoms], and their mask.

    The error is the energy of the omitted coefficients, so the largest ones are kept.
    """
    C = D.T @ task.Z
    mask = support(C.abs(), task.nonzeros, task.pattern)
    return C * mask, mask


def _orthogonal(task: SparseCodingTask, rounds: int) -> tuple[Tensor, list[float]]:
    order = torch.arange(task.atoms) if task.pattern == "unstructured" else interleaved(task.atoms)
    D = _axes(task.Z, order)
    S, _ = orthogonal_codes(task, D)
    errors = []
    for _ in range(rounds):
        D = polar_factor(task.Z @ S.T).to(D.dtype)
        S, _ = orthogonal_codes(task, D)
        errors.append(squared_error(task.Z, D, S))
    return D, errors


def _axes(Z: Tensor, order: Tensor) -> Tensor:
    """Return left singular vectors of Z in the given order, as columns of the identity."""
    return torch.eye(len(Z), dtype=Z.dtype, device=Z.device)[:, order.to(Z.device)]


def polar_factor(M: Tensor) -> Tensor:
    """Return the matrix with orthonormal columns D [dim, atoms] that maximizes ``trace(D^T M)``.

    `M` is [dim, atoms] with dim >= atoms. If its rank is lower than `atoms`, D is not unique.
    Computed as ``M (M^T M)^{-1/2}`` by an eigendecomposition, which a GPU computes several times as
    fast as an SVD. Newton iterations restore the accuracy that squaring the condition number costs.
    """
    M = M.double()
    energies, V = descending_eigh(M.T @ M)
    rank = numerical_rank(energies)
    U = M @ (V[:, :rank] * energies[:rank].rsqrt())  # [dim, rank]
    if rank < len(energies):
        # The product does not depend on this choice, so the seed of the recipe is not used.
        generator = torch.Generator().manual_seed(0)
        rest = torch.randn(len(M), len(energies) - rank, generator=generator, dtype=M.dtype)
        rest = rest.to(M.device)
        for _ in range(2):  # the second pass removes rounding errors of the first
            rest, _ = torch.linalg.qr(rest - U @ (U.T @ rest))
        U = torch.cat([U, rest], dim=1)
    D: Tensor = U @ V.T
    for _ in range(NEWTON_STEPS):
        D = 1.5 * D - 0.5 * D @ (D.T @ D)
    return D


def htp(task: SparseCodingTask) -> SparseCode:
    """Alternate hard-thresholding pursuit for the codes and least squares for the dictionary.

    Notes
    -----
    A round takes a gradient step on all coefficients, keeps the largest of every column, improves
    their values by conjugate gradients (S. Foucart, "Hard Thresholding Pursuit", SIAM Journal on
    Numerical Analysis 49 (6), 2011) and refits the dictionary. Step lengths decrease. Long steps
    can raise the error; the best round is returned.
    """
    Z = task.Z
    D, S, mask = _start(task)
    D, S = refit_dictionary(Z, D, S)
    best, best_error, errors = (D, S, mask), squared_error(Z, D, S), []
    for t in range(task.rounds + FINAL_ROUNDS):
        C, A = D.T @ D, D.T @ Z  # [atoms, atoms], [atoms, d_out]
        if t < task.rounds:
            left = 1 - t / max(task.rounds - 1, 1)
            S = S + (LAST_STEP + (FIRST_STEP - LAST_STEP) * left) * (A - C @ S)
            mask = support(S.abs(), task.nonzeros, task.pattern)
            S = refit_codes(C, A, S * mask, mask, CODE_STEPS)
        else:
            S = refit_codes(C, A, S, mask, FINAL_STEPS)
        D, S = refit_dictionary(Z, D, S)
        error = squared_error(Z, D, S)
        if error < best_error:
            best, best_error = (D, S, mask), error
        if t == task.rounds - 1:
            D, S, mask = best
        errors.append(best_error)
    return SparseCode(*best, tuple(errors))


def _start(task: SparseCodingTask) -> tuple[Tensor, Tensor, Tensor]:
    """Start from an orthogonal dictionary; if it is too small, add the columns of largest error."""
    Z, dim = task.Z, len(task.Z)
    # Removing atoms from a code destroys the pattern 2:4.
    if task.start is not None and task.pattern == "unstructured":
        return _fewer(task, task.start)
    if task.atoms <= dim:
        D, _ = _orthogonal(task, START_ROUNDS)
        return D, *orthogonal_codes(task, D)
    inside = support(Z.abs(), min(task.nonzeros, dim))
    worst = (Z * ~inside).square().sum(0).topk(task.atoms - dim).indices
    D, _ = normalize_atoms(torch.cat([_axes(Z, torch.arange(dim)), Z[:, worst]], dim=1))
    A = D.T @ Z
    mask = support(A.abs(), task.nonzeros, task.pattern)
    return D, refit_codes(D.T @ D, A, torch.zeros_like(A), mask, FINAL_STEPS), mask


def _fewer(task: SparseCodingTask, code: SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the atoms with the largest rows of S, and the largest coefficients of each column."""
    Z = task.Z
    kept = code.S.norm(dim=1).topk(task.atoms).indices
    D, S = code.D[:, kept].to(Z), code.S[kept].to(Z)
    mask = support(S.abs(), task.nonzeros)
    return D, refit_codes(D.T @ D, D.T @ Z, S * mask, mask, CODE_STEPS), mask
