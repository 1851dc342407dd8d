"""Methods: published names as rows of one table.

A method is a function of a weight and its statistics that returns a `Spectrum`: a rate-distortion
curve that can be cut at any rank. Most published systems differ only in the metric.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lrc.compressors.decompose.spectrum import Factors, Spectrum, spectrum

__all__ = ["METHODS", "Factors", "Method", "Spectrum", "Statistics"]


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of one linear layer.

    `H` [d_in, d_in] is the sum over `n_tokens` tokens of ``x x^T``; None where the method asked
    for none or the layer saw no token.
    """

    H: Tensor | None = None
    n_tokens: int = 0


@dataclass(frozen=True)
class Method:
    """One row: how to factor, what it needs to know, and who published it."""

    solve: Callable[..., Spectrum]
    """``solve(W, statistics, **options)``; options are the method's own keys of the recipe."""
    needs_inputs: bool
    """Whether the input second moment has to be collected."""
    options: tuple[str, ...]
    source: str


def _plain(W: Tensor, statistics: Statistics) -> Spectrum:
    return spectrum(W)


def _whitened(W: Tensor, statistics: Statistics, *, damp: float) -> Spectrum:
    return spectrum(W, statistics.H, damp=damp)


METHODS: dict[str, Method] = {
    "svd": Method(_plain, False, (), "Eckart and Young 1936"),
    "svd-llm": Method(_whitened, True, ("damp",), "SVD-LLM, arXiv:2403.07378, section 3.1"),
}
