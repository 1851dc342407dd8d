"""A thin branch in 16 bits that makes up for rounding: ``W ~ Q + L @ R``."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import descending_eigh, whitening_factor
from lrc.compressors.solvers.quantization_grid import check_finite

Kind = Literal["qera", "eora", "lqer"]


def branch(E: Tensor, H: Tensor, rank: int, kind: Kind = "qera") -> tuple[Tensor, Tensor]:
    """Find the product of rank `rank` that leaves least of an error.

    Parameters
    ----------
    E : Tensor, shape [d_out, d_in]
        What rounding has lost, ``W - Q``.
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs; where it is all zero, every input counts the same.
    rank : int
    kind : {"qera", "eora", "lqer"}
        What is minimised: ``tr((E - L R) H (E - L R)^T)`` [1]_; the same over the directions that
        inputs have, numerically, and nothing in the others [2]_; or the same with the diagonal of
        H alone [3]_.

    Returns
    -------
    L : Tensor, shape [d_out, rank]
    R : Tensor, shape [rank, d_in]
        Both in float64; the singular values are shared evenly.

    Raises
    ------
    ValueError
        If `kind` is none, or `rank` is out of range.

    Notes
    -----
    Only the smaller side is decomposed. With the eigenvectors V of ``E H E^T`` the product is
    ``V (V^T E)`` and no root of H is taken; a taller E is solved through a root ``H = P P^T``, as
    ``(E P V) (V^T P^-1)`` with the eigenvectors of ``P^T E^T E P``. [3]_ scales by the mean
    absolute input; the root of the mean square, which H knows, takes its place.

    References
    ----------
    .. [1] C. Zhang et al., "QERA: an Analytical Framework for Quantization Error Reconstruction",
       ICLR 2025. https://arxiv.org/abs/2410.06040
    .. [2] S.-Y. Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace
       Low-Rank Approximation", 2024. https://arxiv.org/abs/2410.21271
    .. [3] C. Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction for LLMs", ICML 2024.
       https://arxiv.org/abs/2402.02446
    """
    d_out, d_in = E.shape
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(f"rank must be in [1, {min(d_out, d_in)}], got {rank}")
    check_finite(E, "the error")
    E, H = E.double(), H.double()
    P, inverse = _root(H, kind)  # [d_in, directions], [directions, d_in]
    if d_out <= P.shape[1]:
        V = descending_eigh((E @ P) @ (E @ P).T)[1][:, :rank]  # [d_out, rank]
        seen = E if kind == "qera" else E @ P @ inverse
        return _balanced(V, V.T @ seen)
    V = descending_eigh((E @ P).T @ (E @ P))[1][:, :rank]  # [directions, rank]
    return _balanced(E @ P @ V, V.T @ inverse)


def _root(H: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return P [d_in, directions] with ``P @ P.T`` the metric, and its (pseudo-)inverse."""
    one = torch.eye(len(H)).to(H)
    if not H.diagonal().any():
        return one, one
    if kind == "lqer":
        # A channel that was never on would be divided by zero.
        sizes = H.diagonal().clamp_min(H.diagonal().max() * torch.finfo(H.dtype).eps).sqrt()
        return torch.diag(sizes), torch.diag(1 / sizes)
    if kind == "eora":
        energies, vectors = descending_eigh(H)
        seen = energies > len(H) * torch.finfo(H.dtype).eps * energies[0]
        sizes, vectors = energies[seen].sqrt(), vectors[:, seen]
        return vectors * sizes, vectors.T / sizes[:, None]
    P, _ = whitening_factor(H, 0.0)
    return P, torch.linalg.solve_triangular(P, one, upper=False)


def _balanced(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Give the columns of L and the rows of R equal lengths, so that both keep well in 16 bits."""
    tiny = torch.finfo(L.dtype).tiny
    share = (R.norm(dim=1) / L.norm(dim=0).clamp_min(tiny)).clamp_min(tiny).sqrt()  # [rank]
    return (L * share).contiguous(), (R / share[:, None]).contiguous()
