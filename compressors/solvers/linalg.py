"""Second moments, whitening and symmetric eigenproblems, with the care that real activations need.

Activations have massive channels, dead channels and fewer directions than dimensions. What follows
from that: sums in float32, eigenproblems in float64, symmetric, on the smaller side only; damping
relative to the mean diagonal; and no failure that is only a log line.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Raising the damping stops here: at 1e-2 of the mean diagonal (GPTQ's default) the optimum itself
# is visibly another one, so a matrix that needs more is factored through its eigenvectors instead.
MAX_DAMP = 1e-2
# Directions below this share of the largest energy are rounding of float64 Gram matrices, not rank.
RANK_TOLERANCE = 1e-14


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let CUDA round the factors of float32 products to TF32, which is several times as fast.

    Sums stay in float32. A Gram matrix of rounded vectors is that of slightly other vectors, still
    positive semi-definite: rounding adds 1e-7 of its own energy to a channel, less than damping.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_second_moment_(H: Tensor, x: Tensor) -> None:
    """Add the Gram matrix of some tokens to a running one, in place.

    Parameters
    ----------
    H : Tensor, shape [d_in, d_in]
        Running sum over tokens of ``x x^T``; float32 or float64.
    x : Tensor, shape [..., d_in]
        Inputs of a linear layer; every leading position is a token.
    """
    x = x.reshape(-1, x.shape[-1]).to(H.dtype)  # [n_tokens, d_in]
    H.addmm_(x.T, x)


def damped(H: Tensor, damp: float) -> Tensor:
    """Return ``H + damp * mean(diag(H)) * I``; `H` is left alone."""
    result = H.clone()
    result.diagonal().add_(damp * H.diagonal().mean())
    return result


def whitening_factor(H: Tensor, damp: float) -> tuple[Tensor, str | None]:
    """Factor a second moment as ``L @ L.T == H + damp * mean(diag(H)) * I``.

    Parameters
    ----------
    H : Tensor, shape [d, d]
        Symmetric positive semi-definite matrix, float64.
    damp : float
        Fraction of the mean diagonal that is added. Raised tenfold, up to `MAX_DAMP`, while the
        Cholesky factorisation fails.

    Returns
    -------
    L : Tensor, shape [d, d]
        Lower triangular, and invertible: the Cholesky factor, or where none exists the one that
        the eigenvectors give, with eigenvalues raised to 1e-12 of the largest.
    fallback : str or None
        What had to be done beyond the request; None if nothing.
    """
    used = damp
    while True:
        L, info = torch.linalg.cholesky_ex(damped(H, used))
        if int(info) == 0:
            return L, None if used == damp else f"damping raised from {damp:g} to {used:g}"
        if used >= MAX_DAMP:
            break
        used = max(used * 10, 1e-10)
    energies, vectors = torch.linalg.eigh(damped(H, damp))
    floor = energies[-1].clamp_min(torch.finfo(H.dtype).tiny) * 1e-12
    root = vectors * energies.clamp_min(floor).sqrt()  # [d, d], root @ root.T == H
    # With root.T = Q R the product is R^T R, so R^T serves: triangular like every other factor.
    return torch.linalg.qr(root.T, mode="r").R.T, "Cholesky failed; whitened by eigenvectors"


def descending_eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (clamped at 0) and eigenvectors of a symmetric matrix, largest first."""
    energies, vectors = torch.linalg.eigh((S + S.T) / 2)
    return energies.flip(0).clamp_min(0), vectors.flip(1)


def descending_eigvalsh(S: Tensor) -> Tensor:
    """Return the eigenvalues alone (clamped at 0) of a symmetric matrix, largest first."""
    energies: Tensor = torch.linalg.eigvalsh((S + S.T) / 2)
    return energies.flip(0).clamp_min(0)


def numerical_rank(energies: Tensor) -> int:
    """Count the energies (squared singular values, largest first) that are more than rounding."""
    return int((energies > RANK_TOLERANCE * energies[0]).sum())


def weighted_error(
    W: Tensor, W_hat: Tensor, H: Tensor | None = None, G: Tensor | None = None
) -> float:
    """Measure ``||K^T (W - W_hat) L||_F^2`` with ``L @ L.T == H`` and ``K @ K.T == G``.

    Without `G` this is the squared error of the output, summed over the tokens of `H`.

    Parameters
    ----------
    W, W_hat : Tensor, shape [d_out, d_in]
    H : Tensor, shape [d_in, d_in], optional
        Second moment of the inputs; the identity if left out.
    G : Tensor, shape [d_out, d_out], optional
        Second moment of the output gradients; the identity if left out.
    """
    E = (W - W_hat).double()
    right = E if H is None else E @ H.double()  # [d_out, d_in]
    left = E if G is None else G.double() @ E  # [d_out, d_in]
    return float((left * right).sum())
