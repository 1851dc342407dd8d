"""The fast dictionary solvers: supports by thresholding, values by least squares, SVD start.

With half of the atoms in every column the greedy pursuit of CoSpaDi takes hundreds of sequential
steps a column. Thresholding decides on all coefficients at once.
"""

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import RANK_TOLERANCE, descending_eigh
from lrc.compressors.solvers.sparse_coding import (
    Code,
    Task,
    energy,
    folded,
    refit_codes,
    refit_dictionary,
    support,
    unit_atoms,
)

# Length of the gradient step before thresholding, in the first and the last round. A long step
# lets unused coefficients in more easily. From 4 down to 1 lost least of what was tried: 15 % less
# than 1 throughout, on Gaussian weights [1536, 576] with inputs of power-law covariance.
FIRST_STEP, LAST_STEP = 4.0, 1.0
# Conjugate-gradient steps a round; 10 change the result by less than 0.1 %, as the start is warm.
CODE_STEPS = 3
# Orthogonal rounds before hard-thresholding pursuit; they are cheaper than its own.
START_ROUNDS = 5
# From the columns' worst, 1e-1 off where energies differ by the tolerance, to rounding.
NEWTON_STEPS = 4
# Rounds with held supports at the end, and the steps of each.
FINAL_ROUNDS, FINAL_STEPS = 3, 4


def rocket(task: Task) -> Code:
    """Threshold the code in the eigenbasis once, then fit the dictionary to it.

    Notes
    -----
    The factorisation of [1]_: importance ``|c_ij| * ||L^{-1} b_i||^0.5`` of coefficient j on
    eigenvector i, then a ridge least-squares dictionary. Its redistribution of 0.5 % of the
    coefficients over all columns is left out: every column has the same number here.

    References
    ----------
    .. [1] "ROCKET", 2026. https://arxiv.org/abs/2602.11008
    """
    Z, k = task.Z, task.atoms
    S = Z[:k]  # the code in the eigenbasis
    mask = support(S.abs() * task.lengths[:k, None].sqrt(), task.nonzeros, task.pattern)
    D, S = refit_dictionary(Z, _axes(Z, torch.arange(k)), S * mask)
    return Code(D, S, mask, (energy(Z, D, S),))


def compot(task: Task) -> Code:
    """Alternate exact codes of an orthogonal dictionary and the best rotation for them.

    Notes
    -----
    The factorisation of [1]_, with one least-squares dictionary at the end: orthogonality is of
    use to the solver, not to the product.

    References
    ----------
    .. [1] "COMPOT", 2026. https://arxiv.org/abs/2602.15200
    """
    D, errors = _orthogonal(task, task.rounds)
    S, mask = orthogonal_codes(task, D)
    D, S = refit_dictionary(task.Z, D, S)
    return Code(D, S, mask, (*errors[:-1], min(errors[-1], energy(task.Z, D, S))))


def orthogonal_codes(task: Task, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best codes ``[atoms, d_out]`` for orthonormal atoms, and their mask.

    The error is then the energy of the coefficients left out, so the largest ones are kept.
    """
    C = D.T @ task.Z
    mask = support(C.abs(), task.nonzeros, task.pattern)
    return C * mask, mask


def _orthogonal(task: Task, rounds: int) -> tuple[Tensor, list[float]]:
    order = torch.arange(task.atoms) if task.pattern == "unstructured" else folded(task.atoms)
    D = _axes(task.Z, order)
    S, _ = orthogonal_codes(task, D)
    errors = []
    for _ in range(rounds):
        D = nearest_orthonormal(task.Z @ S.T).to(D.dtype)
        S, _ = orthogonal_codes(task, D)
        errors.append(energy(task.Z, D, S))
    return D, errors


def _axes(Z: Tensor, order: Tensor) -> Tensor:
    """Return leading left singular vectors of Z as columns: those of the identity."""
    return torch.eye(len(Z), dtype=Z.dtype, device=Z.device)[:, order.to(Z.device)]


def nearest_orthonormal(M: Tensor) -> Tensor:
    """Return the orthonormal columns that maximise ``trace(D^T M)``: the polar factor of M.

    Parameters
    ----------
    M : Tensor, shape [dim, atoms]
        At least as many rows as columns.

    Notes
    -----
    ``M (M^T M)^{-1/2}`` by eigenvectors, which a GPU finds several times as fast as singular
    vectors, and Newton steps for what squaring the condition number has lost. A matrix of lower
    rank has more than one answer: what it does not span is filled up with any orthonormal columns.
    """
    M = M.double()
    energies, V = descending_eigh(M.T @ M)
    rank = int((energies > RANK_TOLERANCE * energies[0]).sum())
    U = M @ (V[:, :rank] * energies[:rank].rsqrt())  # [dim, rank]
    if rank < len(energies):
        # Which ones makes no difference to the product: no seed of the recipe's is spent on them.
        generator = torch.Generator().manual_seed(0)
        rest = torch.randn(len(M), len(energies) - rank, generator=generator, dtype=M.dtype)
        rest = rest.to(M.device)
        for _ in range(2):  # once leaves rounding of what was taken away
            rest, _ = torch.linalg.qr(rest - U @ (U.T @ rest))
        U = torch.cat([U, rest], dim=1)
    D: Tensor = U @ V.T
    for _ in range(NEWTON_STEPS):
        D = 1.5 * D - 0.5 * D @ (D.T @ D)
    return D


def htp(task: Task) -> Code:
    """Alternate hard-thresholding pursuit for the codes and least squares for the dictionary.

    Notes
    -----
    A round takes a gradient step on all coefficients, keeps the largest of every column, improves
    their values by conjugate gradients and refits the dictionary [1]_. The steps shrink from round
    to round. Rounds with a long step may lose more than the one before; the best is returned.

    References
    ----------
    .. [1] S. Foucart, "Hard Thresholding Pursuit: An Algorithm for Compressive Sensing", SIAM
       Journal on Numerical Analysis 49 (6), 2011.
    """
    Z = task.Z
    D, S, mask = _start(task)
    D, S = refit_dictionary(Z, D, S)
    best, best_error, errors = (D, S, mask), energy(Z, D, S), []
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
        error = energy(Z, D, S)
        if error < best_error:
            best, best_error = (D, S, mask), error
        if t == task.rounds - 1:
            D, S, mask = best
        errors.append(best_error)
    return Code(*best, tuple(errors))


def _start(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonal rounds; of a dictionary larger than the space, its axes and its worst columns."""
    Z, dim = task.Z, len(task.Z)
    # What was a pattern of fours before atoms are left out is none behind it.
    if task.start is not None and task.pattern == "unstructured":
        return _fewer(task, task.start)
    if task.atoms <= dim:
        D, _ = _orthogonal(task, START_ROUNDS)
        return D, *orthogonal_codes(task, D)
    inside = support(Z.abs(), min(task.nonzeros, dim))
    worst = (Z * ~inside).square().sum(0).topk(task.atoms - dim).indices
    D, _ = unit_atoms(torch.cat([_axes(Z, torch.arange(dim)), Z[:, worst]], dim=1))
    A = D.T @ Z
    mask = support(A.abs(), task.nonzeros, task.pattern)
    return D, refit_codes(D.T @ D, A, torch.zeros_like(A), mask, FINAL_STEPS), mask


def _fewer(task: Task, code: Code) -> tuple[Tensor, Tensor, Tensor]:
    """Go on with the most used atoms of a larger dictionary, and their largest coefficients."""
    Z = task.Z
    kept = code.S.norm(dim=1).topk(task.atoms).indices
    D, S = code.D[:, kept].to(Z), code.S[kept].to(Z)
    mask = support(S.abs(), task.nonzeros)
    return D, refit_codes(D.T @ D, D.T @ Z, S * mask, mask, CODE_STEPS), mask
