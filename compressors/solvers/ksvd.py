"""The dictionary solver of CoSpaDi: orthogonal matching pursuit and K-SVD, from random columns."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrc.compressors.solvers.sparse_coding import Code, Task, energy, unit_atoms

# Power iterations in place of the SVD of every atom's residual, as in the paper.
POWER_STEPS = 8
# Lengths are set to one this often: the square of one grows with the eighth power of a singular
# value by then, and float32 does not hold much more.
NORMED = 2
# Columns of one batch of pursuit: their number in the paper, unless memory says less.
MAX_COLUMNS = 8192
# The table of a batch, [columns, nonzeros, atoms], stays below this many bytes.
TABLE_BYTES = 2**30
# An atom with less than this share of its energy outside the atoms already chosen depends on them.
DEPENDENT = 1e-5


def cospadi(task: Task) -> Code:
    """Alternate orthogonal matching pursuit and K-SVD, from random columns of the weight.

    Notes
    -----
    Algorithm 1 of [1]_ with the settings of its experiments: the start is a random choice of
    columns of the original weight, not whitened, and of every atom's residual eight power
    iterations are taken. Pursuit may lose more than the round before; the best round is returned,
    the paper returns the last.

    References
    ----------
    .. [1] D. Makhov et al., "CoSpaDi", 2025. https://arxiv.org/abs/2509.22075
    """
    Z = task.Z
    generator = torch.Generator().manual_seed(task.seed)
    chosen = torch.randperm(Z.shape[1], generator=generator)[: task.atoms]
    D, _ = unit_atoms(task.columns(chosen.to(Z.device)).to(Z.dtype))
    best: Code | None = None
    errors: list[float] = []
    for _ in range(task.rounds):
        S, mask = pursue(D, Z, task.nonzeros)
        D, S = ksvd_sweep(Z, D, S, mask)
        error = energy(Z, D, S)
        if best is None or error < errors[-1]:
            best = Code(D, S, mask, ())
        errors.append(min([error, *errors[-1:]]))
    assert best is not None
    return Code(best.D, best.S, best.mask, tuple(errors))


def pursue(D: Tensor, Z: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Code every column by orthogonal matching pursuit, a batch of columns at a time.

    Parameters
    ----------
    D : Tensor, shape [dim, atoms]
        Atoms of unit length.
    Z : Tensor, shape [dim, columns]
    nonzeros : int
        Atoms that every column takes, exactly; the last of them with coefficient zero where all
        atoms left depend on those already taken.

    Returns
    -------
    S : Tensor, shape [atoms, columns]
    mask : Tensor, shape [atoms, columns]
        Which atoms each column took.
    """
    C = D.T @ D  # [atoms, atoms]
    table = nonzeros * len(C) * C.element_size()
    size = max(1, min(MAX_COLUMNS, TABLE_BYTES // table))
    codes = [_pursue_batch(C, D.T @ part, nonzeros) for part in Z.split(size, dim=1)]
    return torch.cat([S for S, _ in codes], dim=1), torch.cat([mask for _, mask in codes], dim=1)


def _pursue_batch(C: Tensor, A: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Run the pursuit on Gram matrix C [atoms, atoms] and correlations A [atoms, columns] alone.

    Every column factors its own part of C as it grows: a partial Cholesky factorisation whose
    pivots the correlations choose. Row t of `table` is ``D^T q_t`` with q_t what the t-th atom adds
    to the span, so that the residual's correlations follow without a solve.
    """
    atoms, columns = A.shape
    every = torch.arange(columns, device=A.device)
    table = A.new_zeros(columns, nonzeros, atoms)
    along = A.new_zeros(columns, nonzeros)  # q_t^T z
    order = torch.zeros(columns, nonzeros, dtype=torch.long, device=A.device)
    residual = A.T.clone()  # [columns, atoms], correlations with what is left
    outside = C.diagonal().expand(columns, atoms).clone()  # energy of atoms outside the span
    free = torch.ones(columns, atoms, dtype=torch.bool, device=A.device)
    for t in range(nonzeros):
        able = free & (outside > DEPENDENT)
        # Atoms that depend on the chosen ones come last, by their order.
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


def ksvd_sweep(Z: Tensor, D: Tensor, S: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Improve atom after atom, together with its coefficients, supports held.

    Each atom and its row of S become a rank-one fit of what the others leave of the columns that
    use it, by power iterations from where it is: the error never rises. The columns are masked
    instead of gathered, which costs twice the products but no shape depends on data.
    """
    D, S = D.T.clone(), S.clone()  # [atoms, dim], [atoms, columns]
    E = Z - D.T @ S  # [dim, columns]
    i = torch.zeros(1, dtype=torch.long, device=Z.device)  # the atom's turn, known to a GPU alone

    def improve() -> None:
        d, s = D.index_select(0, i)[0], S.index_select(0, i)[0]
        own = torch.addr(E, d, s).mul_(mask.index_select(0, i))  # what the others leave
        new = d
        for step in range(1, POWER_STEPS + 1):
            new = own @ (new @ own)
            if step % NORMED == 0:
                new = unit_or(new, d)
        row = new @ own  # [columns]
        E.addr_(d, s).addr_(new, row, alpha=-1)
        D.index_copy_(0, i, new[None])
        S.index_copy_(0, i, row[None])
        i.add_(1)

    _repeat(improve, len(D), Z.device)
    return D.T.contiguous(), S


def _repeat(step: Callable[[], None], times: int, device: torch.device) -> None:
    """Call `step`, which works in place and on one shape alone, `times` times.

    On a GPU it is recorded once and replayed: its two dozen small products would take longer to
    launch than to compute.
    """
    if device.type != "cuda" or times < 2:
        for _ in range(times):
            step()
        return
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # libraries get their workspaces
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
        for _ in range(times - 1):
            graph.replay()
    torch.cuda.current_stream(device).wait_stream(stream)
    stream.synchronize()  # before the graph, and the memory it works in, goes


def unit_or(vector: Tensor, otherwise: Tensor) -> Tensor:
    """Divide by the length; a vector without one gives way, and no GPU is waited for."""
    length = vector.norm()
    return torch.where(length > torch.finfo(vector.dtype).tiny, vector / length, otherwise)
