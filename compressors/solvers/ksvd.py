"""The dictionary solver of CoSpaDi: orthogonal matching pursuit and K-SVD."""

import torch
from torch import Tensor

from lrc.compressors.solvers.cuda_graphs import record
from lrc.compressors.solvers.sparse_coding import (
    SparseCode,
    SparseCodingTask,
    normalize_atoms,
    squared_error,
)

# Power iterations instead of the SVD of every atom's residual, as in the paper.
POWER_STEPS = 8
# Iterations between normalizations. Vectors grow by the square of a singular value per iteration,
# which more iterations would take out of the range of float32.
NORMALIZE_EVERY = 2
# Maximum number of columns coded at once, as in the paper.
MAX_COLUMNS = 8192
# Maximum size in bytes of the table [columns, nonzeros, atoms] of a batch.
TABLE_BYTES = 2**30
# An atom is dependent if less than this fraction of its energy is outside the selected atoms' span.
DEPENDENT = 1e-5


def cospadi(task: SparseCodingTask) -> SparseCode:
    """Alternate orthogonal matching pursuit and K-SVD, starting from random columns of the weight.

    Algorithm 1 of CoSpaDi (https://arxiv.org/abs/2509.22075) with the settings of its experiments:
    the start is a random selection of columns of the original, not whitened, weight, and eight
    power iterations replace each SVD. Pursuit can raise the error; the best round is returned,
    whereas the paper returns the last.
    """
    Z = task.Z
    generator = torch.Generator().manual_seed(task.seed)
    chosen = torch.randperm(Z.shape[1], generator=generator)[: task.atoms]
    D, _ = normalize_atoms(task.columns(chosen.to(Z.device)).to(Z.dtype))
    best: SparseCode | None = None
    errors: list[float] = []
    for _ in range(task.rounds):
        S, mask = matching_pursuit(D, Z, task.nonzeros)
        D, S = ksvd_update(Z, D, S, mask)
        error = squared_error(Z, D, S)
        if best is None or error < errors[-1]:
            best = SparseCode(D, S, mask, ())
        errors.append(min([error, *errors[-1:]]))
    assert best is not None
    return SparseCode(best.D, best.S, best.mask, tuple(errors))


def matching_pursuit(D: Tensor, Z: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Code every column of Z [dim, columns] by orthogonal matching pursuit, in batches of columns.

    The atoms of D [dim, atoms] have unit length, and `nonzeros` of them are selected for every
    column; the coefficient is zero for atoms that depend on those selected before. Returns the
    coefficients and the mask of the selected atoms, both [atoms, columns].
    """
    C = D.T @ D  # [atoms, atoms]
    table = nonzeros * len(C) * C.element_size()
    size = max(1, min(MAX_COLUMNS, TABLE_BYTES // table))
    codes = [_pursue_batch(C, D.T @ part, nonzeros) for part in Z.split(size, dim=1)]
    return torch.cat([S for S, _ in codes], dim=1), torch.cat([mask for _, mask in codes], dim=1)


def _pursue_batch(C: Tensor, A: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Run the pursuit on a Gram matrix C [atoms, atoms] and correlations A [atoms, columns].

    Every column builds a partial Cholesky factorization of C, with pivots that its correlations
    select. Row t of `table` is ``D^T q_t``, where q_t is the part of the t-th atom orthogonal to
    those before it. It updates the correlations of the residual without solving a system.
    """
    atoms, columns = A.shape
    every = torch.arange(columns, device=A.device)
    table = A.new_zeros(columns, nonzeros, atoms)
    along = A.new_zeros(columns, nonzeros)  # q_t^T z
    order = torch.zeros(columns, nonzeros, dtype=torch.long, device=A.device)
    residual = A.T.clone()  # [columns, atoms], correlations with the residual
    outside = C.diagonal().expand(columns, atoms).clone()  # energy of atoms outside the span
    free = torch.ones(columns, atoms, dtype=torch.bool, device=A.device)
    for t in range(nonzeros):
        able = free & (outside > DEPENDENT)
        # Dependent atoms are selected last, in their order.
        score = torch.where(able, residual.abs(), torch.where(free, -1.0, -2.0))
        j = score.argmax(dim=1)  # [columns]
        able_j = able[every, j]
        pivot = torch.where(able_j, outside[every, j], 1.0).sqrt()
        past = table[:, :t]  # [columns, t, atoms]
        seen = past[every, :, j]  # [columns, t]
        row = C[j] - torch.bmm(seen[:, None], past)[:, 0]  # [columns, atoms]
        row = row * (able_j / pivot)[:, None]
        step = residual[every, j] * able_j / pivot
        table[:, t], along[:, t], order[:, t] = row, step, j
        residual -= step[:, None] * row
        outside -= row.square()
        free[every, j] = False
    # L[t, u] = q_u^T d_t; a dependent atom gets 1 on the diagonal and coefficient 0.
    L = table.gather(2, order[:, None].expand(-1, nonzeros, -1)).mT.tril()  # [columns, n, n]
    diagonal = L.diagonal(dim1=1, dim2=2)
    diagonal += diagonal == 0
    values = torch.linalg.solve_triangular(L.mT, along[:, :, None], upper=True)[:, :, 0]
    S = torch.zeros_like(A.T).scatter_(1, order, values)
    return S.T.contiguous(), ~free.T


def ksvd_update(Z: Tensor, D: Tensor, S: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Update each atom of D [dim, atoms] and its row of S [atoms, columns], on fixed supports.

    An atom and its row become a rank-one approximation of the residual without them, on the columns
    that use the atom, by power iterations from their current values: the error never rises. Unused
    columns are masked, not removed: this doubles the products, but no shape depends on data.
    """
    D, S = D.T.clone(), S.clone()  # [atoms, dim], [atoms, columns]
    E = Z - D.T @ S  # [dim, columns]
    i = torch.zeros(1, dtype=torch.long, device=Z.device)  # on the device, so that it can change

    def update_atom() -> None:
        d, s = D.index_select(0, i)[0], S.index_select(0, i)[0]
        own = torch.addr(E, d, s).mul_(mask.index_select(0, i))  # the residual without this atom
        new = d
        for step in range(1, POWER_STEPS + 1):
            new = own @ (new @ own)
            if step % NORMALIZE_EVERY == 0:
                length = new.norm()
                new = torch.where(length > torch.finfo(new.dtype).tiny, new / length, d)
        row = new @ own  # [columns]
        E.addr_(d, s).addr_(new, row, alpha=-1)
        D.index_copy_(0, i, new[None])
        S.index_copy_(0, i, row[None])
        i.add_(1)

    replay = record(update_atom, Z.device)
    for _ in range(len(D) - 1):
        replay()
    if Z.is_cuda:  # before the memory of the graph is freed
        torch.cuda.current_stream(Z.device).synchronize()
    return D.T.contiguous(), S
