"""Compress the factors of a LoRA adapter."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lrc.compressors.deltas.calibrated_moments import MomentsOf, no_moments
from lrc.compressors.deltas.delta_codecs import ENCODERS, Encoded, decode, encode_exact
from lrc.compressors.deltas.encoded_tensors import EncodedTensors
from lrc.compressors.deltas.lora_folder import Lora, keys, truncated_product
from lrc.compressors.deltas.ranks import adapter_ranks, truncated
from lrc.configs.delta_methods import DeltaMethod, LowRank, Ternary

Factors = tuple[Tensor, Tensor]


def encode_adapter(
    lora: Lora, options: DeltaMethod, moments: MomentsOf = no_moments
) -> tuple[Lora, EncodedTensors]:
    """Encode the factors of every layer.

    Parameters
    ----------
    lora : Lora
    options : DeltaMethod
    moments : callable
        Metrics of the products, for `low-rank`.

    Returns
    -------
    Lora
        The adapter, with the ranks of the encoded factors.
    EncodedTensors
        Errors are those of the scaled products.

    Notes
    -----
    The product of the factors stays the same if B is multiplied by an invertible matrix and A by
    its inverse, but the error of the compressed factors does not. A new adapter has random numbers
    in A: few large singular values are then spread over all of its numbers, and the largest numbers
    are no better than others. `balance` chooses between the factors as they are, singular vectors
    times the square roots of singular values (`even`), and a random rotation of these (`rotated`).
    Scales of `ternary` with the least squared error are those of the products.
    """
    if isinstance(options, LowRank):
        result = truncated(lora, adapter_ranks(lora, options, moments), moments)
        candidates = ["stored"]
    else:
        result, measured = lora, options.balance == "measured"
        candidates = ["stored", "even", "rotated"] if measured else [options.balance]
    found = EncodedTensors()
    for module in lora.modules:
        product, own = _product(lora.factors(module)), result.factors(module)
        tried = [_encode(factors, options) for factors in _balanced(own, candidates)]
        distances = [float((_decoded(each, own) - product).norm()) for each in tried]
        best = tried[distances.index(min(distances))]
        scaling = lora.scaling(module)
        exact, stored = scaling * product, scaling * _decoded(best, own)
        metric = moments(f"{module}.weight")
        errors = found.measure(torch.zeros_like(exact), exact, stored, metric)
        for name, factor, each in zip(reversed(keys(module)), own, best, strict=True):
            found.add(name, factor, each, errors)
    return result, found


def _balanced(factors: Factors, candidates: list[str]) -> Iterator[Factors]:
    """Yield factors of the same product, in the dtypes of those given."""
    B, A = factors
    for balance in candidates:
        if balance == "stored":
            yield factors
            continue
        first, second, _ = truncated_product(B, A, len(A))  # [d_out, rank], [rank, d_in]
        if first.shape != B.shape:  # a side of the matrix is smaller than the rank
            yield factors
            continue
        if balance == "rotated":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(len(A), len(A), generator=generator, dtype=torch.float64)
            Q = torch.linalg.qr(noise).Q
            first, second = first @ Q, Q.T @ second
        yield first.to(B.dtype), second.to(A.dtype)


def _encode(factors: Factors, options: DeltaMethod) -> list[Encoded]:
    if isinstance(options, LowRank):
        return [encode_exact(factor, getattr(torch, options.dtype)) for factor in factors]
    fitted = isinstance(options, Ternary) and options.scale == "least-squares"
    used = options.model_copy(update={"alpha": 1.0}) if fitted else options
    encode = ENCODERS[type(options)]
    encoded = [encode(torch.zeros_like(factor), factor, used) for factor in factors]
    if isinstance(options, Ternary) and fitted:
        _fit_scale_(encoded, factors, options.alpha)
    return encoded


def _fit_scale_(encoded: list[Encoded], factors: Factors, alpha: float) -> None:
    """Change the scale of B so that that of the product has the least error, times `alpha`."""
    product, stored = _product(factors), _decoded(encoded, factors)
    energy = float(stored.square().sum())
    best = float((product * stored).sum()) / energy if energy else 1.0
    encoded[0].parts["scale"] *= alpha * best


def _decoded(encoded: list[Encoded], factors: Factors) -> Tensor:
    """Return the product of encoded factors, which have the shapes of `factors`, in float64."""
    B, A = (
        decode(each, torch.zeros_like(factor), factor.dtype)
        for each, factor in zip(encoded, factors, strict=True)
    )
    return _product((B, A))


def _product(factors: Factors) -> Tensor:
    B, A = factors
    return B.double() @ A.double()
