"""Rescalings and rotations of the two factors of a product.

An invertible matrix between two factors leaves their product unchanged, but not the error that
quantizing the factors causes.
"""

from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.solvers.factor_refit import REFIT_DAMP
from lrc.compressors.solvers.linalg import descending_eigh, whitening_factor

Balance = Literal["first", "quarter", "even", "rotated"]
EXPONENTS = {"first": 0.0, "quarter": 0.25, "even": 0.5}
"""Balance -> exponent of the singular values in the left factor."""


def balanced_factors(
    B: Tensor, A: Tensor, H: Tensor, G: Tensor | None = None, *, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a product ``B @ A`` as other pairs of factors, to choose from for quantization.

    B is [d_out, rank] and A is [rank, d_in]. H and G, by default the identity, are the second
    moments of the inputs and of the output gradients; `seed` is that of the random rotation.

    Returns
    -------
    dict
        Balance -> factors B and A in float64. With s the singular values of
        ``G^{1/2} B A H^{1/2}``, the columns of B are orthogonal under G and of length ``s ** p``,
        where p is 0 ("first"), 1/4 ("quarter") or 1/2 ("even"); p = 1 is always worse. "rotated" is
        "even" with a random orthogonal matrix between the factors, which spreads large and small
        components evenly; in nearly every matrix of SmolLM2-135M it causes the least error.
    """
    B, A = B.double(), A.double()
    if G is None:
        Q, T = torch.linalg.qr(B)  # [d_out, rank], [rank, rank]
    else:
        T = whitening_factor(B.T @ G.double() @ B, REFIT_DAMP)[0].T
        Q = torch.linalg.solve_triangular(T, B, upper=True, left=False)
    A = T @ A
    energies, V = descending_eigh(A @ H.double() @ A.T)
    B, A = Q @ V, V.T @ A
    size = energies.clamp_min(energies[0] * torch.finfo(A.dtype).eps).sqrt()  # [rank]
    if not bool(energies[0] > 0):
        size = torch.ones_like(size)
    pairs = {name: (B * size**p, A / size[:, None] ** p) for name, p in EXPONENTS.items()}
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(len(A), len(A), generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(normal).Q.to(A)
    B, A = pairs["even"]
    return pairs | {"rotated": (B @ rotation.T, rotation @ A)}


def equalize_norms(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each column of B [d_out, rank] and row of A [rank, d_in] to equal norms.

    The product is unchanged, and the range of numbers in both factors suits 16 bits.
    """
    ratio = A.norm(dim=1) / B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny)
    scale = torch.where(ratio > 0, ratio, 1).sqrt()  # [rank]
    return (B * scale).contiguous(), (A / scale[:, None]).contiguous()
