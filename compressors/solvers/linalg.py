"""Second moments, whitening factors and symmetric eigenproblems.

Activations have channels of very large variance, channels that are always zero, and fewer
independent directions than dimensions. Therefore sums are taken in float32, eigenproblems are
solved in float64, damping is relative to the mean diagonal, and every fallback is reported.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

# A matrix that needs more damping than this is factored through its eigenvectors instead.
MAX_DAMP = 1e-1
# Eigenvalues below this fraction of the largest are rounding errors of a float64 Gram matrix.
RANK_TOLERANCE = 1e-14


TRIANGULAR_BLOCK = 512
GRAM_BLOCK = 1024


@contextmanager
def tensor_cores(device: str | torch.device) -> Iterator[None]:
    """Allow TF32 in float32 matrix products on CUDA devices, which is several times as fast.

    Sums stay in float32; rounding adds about 1e-7 of a channel's energy to a Gram matrix, less than
    the damping.
    """
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def damped(H: Tensor, damp: float) -> Tensor:
    """Return ``H + damp * mean(diag(H)) * I`` as a new tensor; `H` is [..., d, d]."""
    result = H.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)  # [..., d]
    diagonal.add_(damp * diagonal.mean(dim=-1, keepdim=True))
    return result


def add_product_(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add ``A @ B`` to `total` without a copy; all are matrices, or stacks of as many of them."""
    if total.ndim == 2:
        total.addmm_(A, B)
    else:
        total.baddbmm_(A, B)


def add_gram_(total: Tensor, x: Tensor) -> None:
    """Add ``x.T @ x`` of rows `x` [n, d] to a symmetric `total` [d, d].

    The lower triangle is computed by blocks and copied to the upper one, which takes two thirds of
    the time of a whole product or less.
    """
    for start in range(0, len(total), GRAM_BLOCK):
        rows = slice(start, min(start + GRAM_BLOCK, len(total)))
        total[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop])
        total[:start, rows] = total[rows, :start].T


def invert_triangular_(L: Tensor) -> None:
    """Replace a lower triangular matrix [d, d] by its inverse.

    In blocks, which needs a third of the operations of a triangular solve with the identity on the
    right-hand side, and no second matrix. On a CPU, fastest if rows are contiguous.
    """
    ends = [*range(0, len(L), TRIANGULAR_BLOCK), len(L)]
    for start, stop in pairwise(ends):
        block = slice(start, stop)
        eye = torch.eye(stop - start, dtype=L.dtype, device=L.device)
        corner = torch.linalg.solve_triangular(L[block, block], eye, upper=False)
        # Rows above are those of the inverse V: V_ij = -V_ii sum_k L_ik V_kj, with zeros for k < j.
        sums = torch.empty_like(L[block, :start])
        for first, last in pairwise(end for end in ends if end <= start):
            sums[:, first:last] = L[block, first:start] @ L[first:start, first:last]
        L[block, :start] = torch.mm(corner, sums).neg_()
        L[block, block] = corner


def inverse_of_factored_(L: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(L @ L.T)^-1`` in `dtype` for a lower triangular L [d, d], which is overwritten.

    By blocks: besides L and the result, it takes no memory of their size, while
    `torch.cholesky_inverse` copies L and returns its dtype.
    """
    invert_triangular_(L)
    result = torch.empty_like(L, dtype=dtype)
    for start, stop in pairwise([*range(0, len(L), TRIANGULAR_BLOCK), len(L)]):
        # With V = L^-1, whose columns are zero above the diagonal: the inverse is V.T @ V.
        result[start:, start:stop] = L[start:, start:].T @ L[start:, start:stop]
        result[start:stop, stop:] = result[stop:, start:stop].T
    return result


def whitening_factor(H: Tensor, damp: float) -> tuple[Tensor, str | None]:
    """Factor a second moment as ``L @ L.T == H + damp * mean(diag(H)) * I``.

    Parameters
    ----------
    H : Tensor, shape [d, d]
        Symmetric positive semi-definite, float64.
    damp : float
        Fraction of the mean diagonal added to the diagonal. While the Cholesky factorization fails,
        it is raised tenfold (from 0 to 1e-10), but not above `MAX_DAMP`.

    Returns
    -------
    L : Tensor, shape [d, d]
        Lower triangular and invertible: the Cholesky factor; if there is none even at `MAX_DAMP`, a
        factor from the eigenvectors at the requested damping, with eigenvalues below 1e-12 of the
        largest raised to that.
    fallback : str or None
        Description of the deviation from the request, None if there is none.
    """
    used = damp
    while True:
        with damping_(H, used):
            L, info = torch.linalg.cholesky_ex(H)
        if int(info) == 0:
            return L, None if used == damp else f"damping raised from {damp:g} to {used:g}"
        if used >= MAX_DAMP:
            break
        used = min(max(used * 10, 1e-10), MAX_DAMP)
    energies, vectors = torch.linalg.eigh(damped(H, damp))
    floor = energies[-1].clamp_min(torch.finfo(H.dtype).tiny) * 1e-12
    root = vectors * energies.clamp_min(floor).sqrt()  # [d, d], root @ root.T == H
    # With root.T == Q @ R the product root @ root.T is R.T @ R, and R.T is lower triangular.
    return torch.linalg.qr(root.T, mode="r").R.T, "Cholesky failed; whitened by eigenvectors"


@contextmanager
def damping_(H: Tensor, damp: float) -> Iterator[None]:
    """Let `H` have the values of `damped` in the context, without a copy of a large matrix."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)  # [..., d]
    before = diagonal.clone()
    diagonal.add_(damp * diagonal.mean(dim=-1, keepdim=True))
    try:
        yield
    finally:
        diagonal.copy_(before)


def descending_eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues and eigenvectors of a symmetric matrix in descending order.

    Negative eigenvalues are set to 0. Eigenvectors are the columns.
    """
    energies, vectors = torch.linalg.eigh((S + S.T) / 2)
    return energies.flip(0).clamp_min(0), vectors.flip(1)


def numerical_rank(energies: Tensor) -> int:
    """Count the squared singular values [d], largest first, above `RANK_TOLERANCE`."""
    return int((energies > RANK_TOLERANCE * energies[0]).sum())


def check_size(name: str, size: int, most: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless a size of a component of a weight is in [1, most]."""
    if not 1 <= size <= most:
        raise ValueError(f"{name} must be in [1, {most}] for a weight {list(shape)}, got {size}")


def weighted_error(
    W: Tensor, W_hat: Tensor, H: Tensor | None = None, G: Tensor | None = None
) -> float:
    """Compute ``tr(G E H E^T)`` with ``E = W - W_hat`` [d_out, d_in], in float64, at least 0.

    `H` [d_in, d_in] and `G` [d_out, d_out] default to the identity. Without `G` this is the squared
    error of the layer's output, summed over the tokens of `H`.
    """
    E = (W - W_hat).double()
    if H is not None and G is None:
        return max(0.0, float(_quadratic_form(E, H)))  # of a singular H, rounding has either sign
    right = E if H is None else E @ H.double()  # [d_out, d_in]
    left = E if G is None else G.double() @ E  # [d_out, d_in]
    return max(0.0, float((left * right).sum()))  # of a singular H, rounding has either sign


def _quadratic_form(E: Tensor, H: Tensor) -> Tensor:
    """Return ``tr(E H E^T)`` from the lower triangle of `H`, by blocks of columns."""
    total = E.new_zeros(())
    for start in range(0, len(H), TRIANGULAR_BLOCK):
        block = slice(start, start + TRIANGULAR_BLOCK)
        rows = H[block, : block.stop].to(torch.float64, copy=True)  # [block, columns up to here]
        rows[:, :start] *= 2
        total += ((E[:, : block.stop] @ rows.T) * E[:, block]).sum()
    return total
