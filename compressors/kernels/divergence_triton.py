"""A Triton kernel for the gradient of divergences at logits."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

WORDS = 4096
"""Logits that a program reads at once."""
WARPS = 8
LOWEST = -1e30
"""Instead of minus infinity, whose differences are undefined."""


def gradient(
    dense: Tensor,
    compressed: Tensor,
    labels: Tensor,
    *,
    forward: bool,
    reverse: bool,
    weight: float,
) -> Tensor:
    """Return the gradient [n, vocabulary] in the dtype of `compressed`.

    It reads the logits two or three times, and writes the result only. Rows of logits must be
    contiguous. The parameters are those of `logit_divergence.fused_gradient`.
    """
    n, n_words = compressed.shape
    found = compressed.new_empty(n, n_words)
    _gradient[(n,)](
        dense,
        compressed,
        labels,
        found,
        n_words,
        dense.stride(0),
        compressed.stride(0),
        weight,
        LOWEST,
        FORWARD=forward,
        REVERSE=reverse,
        WORDS=WORDS,
        num_warps=WARPS,
    )
    return found


@triton.jit
def _gradient(
    dense,
    compressed,
    labels,
    found,
    n_words,
    dense_stride,
    compressed_stride,
    weight,
    lowest,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dense += row * dense_stride
    compressed += row * compressed_stride
    found += row * n_words
    words = tl.arange(0, WORDS)
    # Maxima and sums of exponentials, separately for every lane.
    top_p = tl.full([WORDS], lowest, tl.float32)
    top_q = tl.full([WORDS], lowest, tl.float32)
    sum_p = tl.zeros([WORDS], tl.float32)
    sum_q = tl.zeros([WORDS], tl.float32)
    for start in range(0, n_words, WORDS):
        at = start + words
        p = tl.load(dense + at, mask=at < n_words, other=0.0).to(tl.float32)
        q = tl.load(compressed + at, mask=at < n_words, other=0.0).to(tl.float32)
        p = tl.where(at < n_words, p, lowest)
        q = tl.where(at < n_words, q, lowest)
        top = tl.maximum(top_p, p)
        sum_p = sum_p * tl.exp(top_p - top) + tl.exp(p - top)
        top_p = top
        top = tl.maximum(top_q, q)
        sum_q = sum_q * tl.exp(top_q - top) + tl.exp(q - top)
        top_q = top
    largest_p = tl.max(top_p, axis=0)
    largest_q = tl.max(top_q, axis=0)
    total_p = largest_p + tl.log(tl.sum(sum_p * tl.exp(top_p - largest_p), axis=0))
    total_q = largest_q + tl.log(tl.sum(sum_q * tl.exp(top_q - largest_q), axis=0))
    divergence = 0.0
    if REVERSE:
        terms = tl.zeros([WORDS], tl.float32)
        for start in range(0, n_words, WORDS):
            at = start + words
            p = tl.load(dense + at, mask=at < n_words, other=0.0).to(tl.float32) - total_p
            q = tl.load(compressed + at, mask=at < n_words, other=0.0).to(tl.float32) - total_q
            terms += tl.where(at < n_words, tl.exp(q) * (q - p), 0.0)
        divergence = tl.sum(terms, axis=0)
    label = tl.load(labels + row)
    of_label = tl.where(label >= 0, weight, 0.0)
    for start in range(0, n_words, WORDS):
        at = start + words
        p = tl.load(dense + at, mask=at < n_words, other=0.0).to(tl.float32) - total_p
        q = tl.load(compressed + at, mask=at < n_words, other=0.0).to(tl.float32) - total_q
        probability = tl.exp(q)
        step = tl.zeros([WORDS], tl.float32)
        if REVERSE:
            step = probability * (q - p - divergence)
        if FORWARD:
            step += probability - tl.exp(p)
        if FORWARD and REVERSE:
            step = step / 2
        step += of_label * (probability - tl.where(at == label, 1.0, 0.0))
        tl.store(found + at, step.to(found.dtype.element_ty), mask=at < n_words)
