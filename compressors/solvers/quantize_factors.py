"""Quantization of the two factors of a product, each refitted after the other is quantized."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.factor_balancing import Balance, balanced_factors
from lrc.compressors.solvers.factor_refit import compensation_target, refit_left, refit_right
from lrc.compressors.solvers.gptq import QuantizerName, check_metric, quantize_matrix
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix

ROUNDS = 2
"""Default number of times that both factors are quantized. On SmolLM2-135M, at 0.8 of the numbers,
the second round lowers the error on held-out text by 3 % at int4-g64 and 8 % at int3-g64, that of
pivot rows by 10 and 13 %; a third by another 1 and 2 %, 4 and 4 %."""

Quantizer = Callable[[Tensor, Tensor], QuantizedMatrix]


@dataclass(frozen=True)
class QuantizedLowRank:
    """A weight as a product ``b.weight() @ a.weight()``, and its error ``tr(G E H E^T)``."""

    a: QuantizedMatrix
    """[rank, d_in]"""
    b: QuantizedMatrix
    """[d_out, rank]"""
    balance: str
    error: float
    errors: dict[str, float]
    """Balance -> error of rounding to nearest, for all that were measured."""


@dataclass(frozen=True)
class QuantizedPivoted:
    """A weight as ``cat([R, C @ R])[order]``, quantized, and its error ``tr(G E H E^T)``."""

    a: QuantizedMatrix
    """R, [rank, d_in]"""
    c: QuantizedMatrix | None
    """C, [d_out - rank, rank]; None if every row is a pivot."""
    order: Tensor
    """[d_out], int64"""
    error: float

    def weight(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float64."""
        R = self.a.weight()
        return (R if self.c is None else torch.cat([R, self.c.weight() @ R]))[self.order]


def quantize_low_rank(
    W: Tensor,
    B: Tensor,
    A: Tensor,
    H: Tensor,
    scheme: QuantizationArgs,
    *,
    dtype: torch.dtype,
    quantizer: QuantizerName = "gptq",
    balance: Balance | Literal["measured"] = "measured",
    seed: int = 0,
    G: Tensor | None = None,
    rounds: int = ROUNDS,
) -> QuantizedLowRank:
    """Quantize the factors of a low-rank weight, each to compensate for the error of the other.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        The weight that the product approximates.
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    H, G : Tensor
        Second moments of the inputs and of the output gradients; G is the identity if omitted.
    dtype : torch.dtype
        Dtype of the stored scales.
    balance : {"measured", "first", "quarter", "even", "rotated"}
        See `balanced_factors`; "measured" takes the one of least error after rounding both factors
        to nearest.
    seed : int
        Seed of the random rotation.
    rounds : int
        Number of times that both factors are quantized; the best result is kept.

    Raises
    ------
    ScaleOverflow
        If scales overflow `dtype` with every balance.
    ValueError
        If `quantizer` or `balance` is unknown, and see `gptq`.
    """
    check_metric(W, H)
    W, H = W.double(), H.double()
    G = None if G is None else G.double()
    pairs = balanced_factors(B, A, H, G, seed=seed)
    quantize = partial(quantize_matrix, scheme=scheme, quantizer=quantizer, dtype=dtype)
    errors: dict[str, float] = {}
    if balance == "measured":
        nearest = partial(quantize, quantizer="rtn")
        for name, pair in pairs.items():
            with suppress(ScaleOverflow):  # another balance may have smaller scales
                errors[name] = _alternate(W, *pair, H, G, nearest)[0]
        if not errors:
            raise ScaleOverflow(f"scales of both factors overflow {dtype} with every balance")
    elif balance not in pairs:
        raise ValueError(f"balance must be measured or one of {', '.join(pairs)}, got {balance!r}")
    chosen = min(errors, key=lambda name: errors[name]) if errors else balance
    error, a, b = _alternate(W, *pairs[chosen], H, G, quantize, rounds=rounds)
    assert b is not None
    return QuantizedLowRank(a, b, chosen, error, errors)


def quantize_pivoted(
    W: Tensor,
    R: Tensor,
    C: Tensor,
    order: Tensor,
    H: Tensor,
    scheme: QuantizationArgs,
    *,
    dtype: torch.dtype,
    quantizer: QuantizerName = "gptq",
    G: Tensor | None = None,
    rounds: int = ROUNDS,
) -> QuantizedPivoted:
    """Quantize pivot rows and the coefficients of the other rows, which compensate for the errors.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        The weight that ``cat([R, C @ R])[order]`` approximates.
    R : Tensor, shape [rank, d_in]
    C : Tensor, shape [d_out - rank, rank]
    order : Tensor, shape [d_out]
    H, scheme, dtype, quantizer, G, rounds
        As for `quantize_low_rank`; so are the errors raised.
    """
    check_metric(W, H)
    W, R, C, H = W.double(), R.double(), C.double(), H.double()
    B = torch.cat([torch.eye(len(R)).to(R), C])  # [d_out, rank]
    stored = order.long().argsort()  # the rows of W in the order of the file, pivots first
    G = None if G is None else G.double()[stored][:, stored]
    quantize = partial(quantize_matrix, scheme=scheme, quantizer=quantizer, dtype=dtype)
    error, a, c = _alternate(W[stored], B, R, H, G, quantize, rounds=rounds, fixed=len(R))
    return QuantizedPivoted(a, c, order.long(), error)


def _alternate(
    target: Tensor,
    B: Tensor,
    A: Tensor,
    H: Tensor,
    G: Tensor | None,
    quantize: Quantizer,
    *,
    rounds: int = 1,
    fixed: int = 0,
) -> tuple[float, QuantizedMatrix, QuantizedMatrix | None]:
    """Quantize A, then B except its first `fixed` rows; return the best error and its factors."""
    found = []
    for _ in range(rounds):
        a, b = quantize(A, H), None
        A = a.weight()
        if fixed < len(B):
            error = target[:fixed] - B[:fixed] @ A
            others = target[fixed:] + compensation_target(error, G, fixed)
            b = quantize(*refit_left(others, B[fixed:], A, H))
            B = torch.cat([B[:fixed], b.weight()])
        found.append((weighted_error(target, B @ A, H, G), a, b))
        A = refit_right(target, B, A, G)
    return min(found, key=lambda result: result[0])
