"""Calibration statistics of one linear layer: second moments of its two sides, and plain sums.

Everything is a sum over tokens, so that batches can be added; `n_tokens` is stored alongside.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

TOKEN_CAP = 10.0
"""Energy ``|x|^2`` above this multiple of the window's median is capped. In layers without massive
activations, only a few of 10,000 tokens are affected."""


STARVED = 0.25
"""Tokens per input channel below which an expert counts as starved."""


def needed_tokens(d_in: int) -> int:
    """Return the number of tokens that statistics of `d_in` input channels of an expert need.

    With fewer, most of the second moment is damping: a solver would fit a handful of tokens and
    ignore all other directions. The limit only matters for experts that the calibration text hardly
    uses; all other layers receive every token.
    """
    return math.ceil(STARVED * d_in)


def token_weights(x: Tensor, window: int) -> Tensor:
    """Return one weight per token that caps its contribution to a second moment.

    In most models a few tokens, the first of a text among them, have inputs of some layers whose
    energy ``|x|^2`` is 100 to 100,000 times that of others (massive activations,
    https://arxiv.org/abs/2402.17762). Uncapped, they dominate the second moment, although the
    normalization after the layer makes their errors no more important than those of other tokens.
    Quantized weights would then fit a few tokens of the calibration text and be worse on everything
    else.

    Parameters
    ----------
    x : Tensor, shape [n_tokens, d]
        Consecutive windows of tokens; or any number of tokens, which are then one window.
    window : int
        Tokens per window.

    Returns
    -------
    Tensor, shape [n_tokens, 1]
        1, or less where the energy exceeds `TOKEN_CAP` times the median of the window: then the
        weighted energy equals that limit. A median of zero sets no limit.
    """
    if len(x) == 0:
        return x.new_ones(0, 1)
    if len(x) % window:
        window = len(x)  # one window
    windows = x.square().sum(dim=1).view(-1, window)
    limit = TOKEN_CAP * windows.quantile(0.5, dim=1, keepdim=True)
    weights = torch.where((windows > limit) & (limit > 0), limit / windows, 1)
    return weights.view(-1, 1)


@dataclass(frozen=True)
class Moment:
    """Second moment of one side of a linear layer, summed over tokens.

    At least one of `full` and `image` is present. The image is the moment multiplied by the weight
    from both sides: the Gram matrix of the layer's *outputs*, or of the gradients at its inputs.
    For a side that is much wider than the other (the 14336 inputs of a down projection to 4096)
    the solver needs only the image, and only the image is accumulated.

    Raises
    ------
    ValueError
        If both `full` and `image` are None.
    """

    diagonal: Tensor
    """[d]; damping is relative to its mean."""
    full: Tensor | None = None
    """[d, d]"""
    image: Tensor | None = None
    """For inputs ``W M W^T`` [d_out, d_out]; for output gradients ``W^T M W`` [d_in, d_in]."""

    def __post_init__(self) -> None:
        if self.full is None and self.image is None:
            raise ValueError("a moment needs 'full' or 'image', got neither")

    @classmethod
    def of(cls, full: Tensor) -> Self:
        """Return the moment of a full matrix [d, d]."""
        return cls(full.diagonal(), full=full)

    @classmethod
    def weighted(cls, weights: Tensor, W: Tensor) -> Self:
        """Return the moment ``diag(weights)`` of the columns of `W`, as `full` or as an image.

        `W` is [other, d], transposed for a moment of the output gradients; `weights` [d] are >= 0.
        """
        other, d = W.shape
        W, weights = W.double(), weights.double()
        return cls(
            weights,
            full=torch.diag(weights) if d <= other else None,
            image=(W * weights) @ W.T if d >= other else None,
        )

    def scaled(self, factor: float) -> "Moment":
        """Return the moment of tokens with weights `factor`."""
        full, image = (None if m is None else m * factor for m in (self.full, self.image))
        return Moment(self.diagonal * factor, full, image)

    @property
    def empty(self) -> bool:
        """Whether all samples were zero."""
        return not bool(self.diagonal.any())

    def whole(self) -> Tensor:
        """Return `full` in float64.

        Raises
        ------
        ValueError
            If only the image was accumulated.
        """
        if self.full is None:
            raise ValueError(
                f"the whole second moment of {len(self.diagonal)} channels is needed, but only "
                "its image through the weight was accumulated; accumulate 'full' on the narrow side"
            )
        return self.full.double()

    def through(self, W: Tensor, damp: float = 0.0) -> Tensor:
        """Return ``W (M + damp * mean(diag(M)) * I) W^T`` [other, other] in float64.

        `W` [other, d] is the weight, or its transpose for a moment of the output gradients.
        """
        W = W.double()
        seen = W @ self.whole() @ W.T if self.image is None else self.image.double()
        if damp == 0:
            return seen
        return seen + damp * self.diagonal.double().mean() * (W @ W.T)  # [other, other]

    def centred(self, total: Tensor, n_tokens: int, W: Tensor) -> "Moment":
        """Return the moment about the mean, ``M - s s^T / n``.

        `total` [d] is the sum s over all tokens; `W` is that of `through`.
        """
        s = total.double()
        seen = W.double() @ s  # [other]
        # With float32 sums the variance of a constant channel can come out slightly negative.
        full, image = (
            None if moment is None else moment.double() - torch.outer(mean, mean / n_tokens)
            for moment, mean in ((self.full, s), (self.image, seen))
        )
        return Moment((self.diagonal.double() - s * s / n_tokens).clamp_min(0), full, image)


def without_empty(
    inputs: Moment | None, gradients: Moment | None
) -> tuple[Moment | None, Moment | None, list[str]]:
    """Return the moments, with None for each that is entirely zero, and a note for each None."""
    notes = []
    if inputs is not None and inputs.empty:
        inputs = None
        notes.append("inputs were all zero; left out of the metric")
    if gradients is not None and gradients.empty:
        gradients = None
        notes.append("gradients were all zero; left out of the metric")
    return inputs, gradients, notes


@dataclass(frozen=True)
class Statistics:
    """Statistics of a linear layer; None if not requested, or if the layer received no token."""

    n_tokens: int = 0
    inputs: Moment | None = None
    """Of the inputs ``x``."""
    gradients: Moment | None = None
    """Of the gradients of the summed token losses at the layer's output."""
    input_mean: Tensor | None = None
    """[d_in], sum of ``x`` over tokens; divide by `n_tokens` for the mean."""
    input_magnitude: Tensor | None = None
    """[d_in], sum of ``|x|`` over tokens."""
    row_fisher: Tensor | None = None
    """[d_out], sum over samples of the squared weight gradients of each row."""

    def missing(self, needs: Collection[str]) -> list[str]:
        """Return the required fields that are None, in alphabetical order."""
        return sorted(name for name in needs if getattr(self, name) is None)
