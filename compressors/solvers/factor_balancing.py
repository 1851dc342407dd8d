"""Two factors of one product, written in ways from which rounding takes differently much.

A product ``B @ A`` stays what it is when an invertible matrix is put between its factors, rounding
does not: the choice is a gauge.
"""

from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.solvers.factor_refit import REFIT_DAMP
from lrc.compressors.solvers.linalg import descending_eigh, whitening_factor

Gauge = Literal["first", "quarter", "even", "rotated"]
SHARES = {"first": 0.0, "quarter": 0.25, "even": 0.5}
"""Gauge -> exponent of the singular values in the second factor."""


def gauges(
    B: Tensor, A: Tensor, H: Tensor, G: Tensor | None = None, *, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a product in several ways, from which rounding takes differently much.

    Parameters
    ----------
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs.
    G : Tensor, shape [d_out, d_out], optional
        Second moment of the output gradients, if the error is weighed by it.
    seed : int
        Of the rotation.

    Returns
    -------
    dict
        Gauge -> factors in float64, whose product is ``B @ A``. With the singular values s of
        ``G^{1/2} B A H^{1/2}``, B has columns that are orthogonal under G, of length ``s ** p``,
        and p is 0 ("first", all of them in A), 1/4 or 1/2 ("quarter", "even"); "rotated" is "even"
        behind a random orthogonal matrix, which spreads large and small components over all rows of
        A and columns of B.

    Notes
    -----
    All of them in B is never tried: on SmolLM2-135M rounding to nearest then takes 1.5 (int3) to 5
    times (int8) the energy that it takes from "even"; from "rotated" it takes least in nearly every
    matrix.
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
    found = {name: (B * size**p, A / size[:, None] ** p) for name, p in SHARES.items()}
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(len(A), len(A), generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(normal).Q.to(A)
    B, A = found["even"]
    return found | {"rotated": (B @ rotation.T, rotation @ A)}
