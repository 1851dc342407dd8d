"""A low-rank correction of the quantization error in 16 bits: ``W ~ Q + L @ R``."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lrc.compressors.solvers.factor_balancing import equalize_norms
from lrc.compressors.solvers.linalg import check_size, descending_eigh, whitening_factor
from lrc.compressors.solvers.quantization_grid import check_finite

Kind = Literal["qera", "eora", "lqer"]


def low_rank_correction(
    E: Tensor, H: Tensor, rank: int, kind: Kind = "qera"
) -> tuple[Tensor, Tensor]:
    """Compute factors L [d_out, rank] and R [rank, d_in] that reduce a quantization error most.

    They are in float64, and columns of L and rows of R have equal norms.

    Parameters
    ----------
    E : Tensor, shape [d_out, d_in]
        Quantization error ``W - Q``.
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs; if it is zero, the identity is used.
    rank : int
        In ``[1, min(d_out, d_in)]``.
    kind : {"qera", "eora", "lqer"}
        What is minimized: ``tr((E - L R) H (E - L R)^T)`` (QERA, https://arxiv.org/abs/2410.06040);
        the same restricted to the numerical range of H, with no correction outside (EoRA,
        https://arxiv.org/abs/2410.21271); or the same with the diagonal of H only (LQER,
        https://arxiv.org/abs/2402.02446, with the root mean square in place of the mean absolute
        input).

    Raises
    ------
    ValueError
        If `kind` is unknown, `rank` is out of range or `E` is not finite.

    Notes
    -----
    The eigenvectors V of ``E H E^T`` give ``V (V^T E)``, without a root of H. A taller E is solved
    with a root ``H = P P^T``, as ``(E P V) (V^T P^-1)`` with the eigenvectors of ``P^T E^T E P``.
    """
    d_out, d_in = E.shape
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    check_size("rank", rank, min(d_out, d_in), E.shape)
    check_finite(E, "the error")
    E, H = E.double(), H.double()
    P, inverse = _root(H, kind)  # [d_in, directions], [directions, d_in]
    EP = E @ P  # [d_out, directions]
    if d_out <= P.shape[1]:
        V = descending_eigh(EP @ EP.T)[1][:, :rank]  # [d_out, rank]
        return equalize_norms(V, V.T @ (E if kind == "qera" else EP @ inverse))
    V = descending_eigh(EP.T @ EP)[1][:, :rank]  # [directions, rank]
    return equalize_norms(EP @ V, V.T @ inverse)


def _root(H: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return P [d_in, directions] with ``P @ P.T`` the metric, and its (pseudo-)inverse."""
    one = torch.eye(len(H)).to(H)
    if not H.diagonal().any():
        return one, one
    if kind == "lqer":
        # The lower bound avoids a division by zero for channels that are always zero.
        sizes = H.diagonal().clamp_min(H.diagonal().max() * torch.finfo(H.dtype).eps).sqrt()
        return torch.diag(sizes), torch.diag(1 / sizes)
    if kind == "eora":
        energies, vectors = descending_eigh(H)
        seen = energies > len(H) * torch.finfo(H.dtype).eps * energies[0]
        sizes, vectors = energies[seen].sqrt(), vectors[:, seen]
        return vectors * sizes, vectors.T / sizes[:, None]
    P, _ = whitening_factor(H, 0.0)
    return P, torch.linalg.solve_triangular(P, one, upper=False)
