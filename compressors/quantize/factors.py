"""Two factors as integers: how to share the scales, and the second made to fit the rounded first.

A product ``B @ A`` stays what it is when an invertible matrix is put between its factors, rounding
does not: the choice is a gauge. The second factor is then solved anew for the first as rounded, so
that it makes up for what it can.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.linalg import descending_eigh, weighted_error, whitening_factor
from lrc.compressors.quantize.gptq import check_metric, gptq
from lrc.compressors.quantize.rounded import Rounded
from lrc.compressors.quantize.rtn import rtn

Rounder = Literal["rtn", "gptq"]
Gauge = Literal["first", "quarter", "even", "rotated"]
SHARES = {"first": 0.0, "quarter": 0.25, "even": 0.5}
"""Gauge -> exponent of the singular values in the second factor."""
REFIT_DAMP = 1e-8


@dataclass(frozen=True)
class RoundedPair:
    """A weight as the product of two matrices of integers, ``W_hat = b.weight() @ a.weight()``."""

    a: Rounded
    """[rank, d_in]"""
    b: Rounded
    """[d_out, rank]"""
    gauge: str
    error: float
    """``tr(G E H E^T)`` with ``E = W - W_hat``."""
    errors: dict[str, float]
    """Gauge -> error, of all that were tried."""


@dataclass(frozen=True)
class RoundedPivot:
    """A weight as pivot rows and coefficients: ``cat([R, C @ R])[order]``, both of integers."""

    a: Rounded
    """R, [rank, d_in]"""
    c: Rounded | None
    """C, [d_out - rank, rank]; None if every row is a pivot."""
    order: Tensor
    """[d_out], int64"""
    error: float
    """``tr(G E H E^T)`` with ``E = W - W_hat``."""

    def weight(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float64."""
        R = self.a.weight()
        return (R if self.c is None else torch.cat([R, self.c.weight() @ R]))[self.order]


def gauges(B: Tensor, A: Tensor, H: Tensor, *, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a product in several ways, from which rounding takes differently much.

    Parameters
    ----------
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs.
    seed : int
        Of the rotation.

    Returns
    -------
    dict
        Gauge -> factors in float64, whose product is ``B @ A``. With the singular values s of
        ``B A H^{1/2}``, B has orthogonal columns of length ``s ** p`` and p is 0 ("first", all of
        them in A), 1/4 or 1/2 ("quarter", "even"); "rotated" is "even" behind a random orthogonal
        matrix, which spreads large and small components over all rows of A and columns of B.

    Notes
    -----
    With all of the singular values in B, int4 takes between a fifth and twice as much again.
    """
    B, A = B.double(), A.double()
    Q, T = torch.linalg.qr(B)  # [d_out, rank], [rank, rank]
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


def refit(
    target: Tensor, B: Tensor, A: Tensor, H: Tensor, damp: float = REFIT_DAMP
) -> tuple[Tensor, Tensor]:
    """Solve the second factor anew for the first, as it has become.

    Minimises ``tr((V - B' A) H (V - B' A)^T)`` over B', V the target; damping pulls towards B, so
    that the error never rises.

    Parameters
    ----------
    target : Tensor, shape [d_out, d_in]
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    H : Tensor, shape [d_in, d_in]
    damp : float
        Fraction of the mean diagonal of ``A H A^T`` added to it.

    Returns
    -------
    B : Tensor, shape [d_out, rank]
    seen : Tensor, shape [rank, rank]
        ``A H A^T``, the second moment of what B is applied to.
    """
    seen = A @ H @ A.T
    if not seen.diagonal().any():
        return B, seen
    L, _ = whitening_factor(seen, damp)
    missing = (target - B @ A) @ H @ A.T  # [d_out, rank]
    return B + torch.cholesky_solve(missing.T, L).T, seen


def round_pair(
    W: Tensor,
    B: Tensor,
    A: Tensor,
    H: Tensor,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    rounder: Rounder = "gptq",
    gauge: Gauge | Literal["measured"] = "measured",
    seed: int = 0,
    G: Tensor | None = None,
) -> RoundedPair:
    """Round the factors of a weight, the second one behind the first.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        The weight that the product stands for.
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs.
    scheme : Scheme
    dtype : torch.dtype
        Of the scales in the file.
    rounder : {"rtn", "gptq"}
    gauge : {"measured", "first", "quarter", "even", "rotated"}
        What `gauges` says; or all of them, of which the best is kept.
    seed : int
        Of the rotation.
    G : Tensor, shape [d_out, d_out], optional
        Second moment of the output gradients, for the errors that gauges are compared by.

    Raises
    ------
    ValueError
        If `rounder` or `gauge` is none, and what the rounders say.
    """
    round_ = _rounder(rounder, scheme, dtype)
    check_metric(W, H)
    W, H = W.double(), H.double()
    ways = gauges(B, A, H, seed=seed)
    if gauge != "measured":
        if gauge not in ways:
            raise ValueError(f"gauge must be measured or one of {', '.join(ways)}, got {gauge!r}")
        ways = {gauge: ways[gauge]}
    found = {}
    for name, (left, right) in ways.items():
        a = round_(right, H)
        b = round_(*refit(W, left, a.weight(), H))
        found[name] = weighted_error(W, b.weight() @ a.weight(), H, G), a, b
    best = min(found, key=lambda name: found[name][0])
    error, a, b = found[best]
    return RoundedPair(a, b, best, error, {name: way[0] for name, way in found.items()})


def round_pivot(
    W: Tensor,
    R: Tensor,
    C: Tensor,
    order: Tensor,
    H: Tensor,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    rounder: Rounder = "gptq",
    G: Tensor | None = None,
) -> RoundedPivot:
    """Round pivot rows, and the coefficients of the other rows behind them.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        The weight that ``cat([R, C @ R])[order]`` stands for.
    R : Tensor, shape [rank, d_in]
    C : Tensor, shape [d_out - rank, rank]
    order : Tensor, shape [d_out]
    H : Tensor, shape [d_in, d_in]
        Second moment of the inputs.
    scheme : Scheme
    dtype : torch.dtype
        Of the scales in the file.
    rounder : {"rtn", "gptq"}
    G : Tensor, shape [d_out, d_out], optional
        Second moment of the output gradients, for the error that is reported.

    Raises
    ------
    ValueError
        If `rounder` is none, and what the rounders say.
    """
    round_ = _rounder(rounder, scheme, dtype)
    check_metric(W, H)
    W, R, C, H = W.double(), R.double(), C.double(), H.double()
    order = order.long()
    rank = len(R)
    a, c = round_(R, H), None
    if len(C):
        others = W[order.argsort()[rank:]]  # [d_out - rank, d_in]
        c = round_(*refit(others, C, a.weight(), H))
    found = RoundedPivot(a, c, order, 0.0)
    return replace(found, error=weighted_error(W, found.weight(), H, G))


def _rounder(
    rounder: Rounder, scheme: Scheme, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Rounded]:
    if rounder == "rtn":
        return lambda W, H: rtn(W, scheme, dtype=dtype, H=H)
    if rounder == "gptq":
        return lambda W, H: gptq(W, H, scheme, dtype=dtype)
    raise ValueError(f"rounder must be rtn or gptq, got {rounder!r}")
