"""Adapters: differences to a frozen matrix with few trained numbers.

All start at zero. Their numbers are relative to the `size` of the matrix, its root mean square, so
that a learning rate means the same for an adapter as for the matrix.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Adapter(nn.Module, ABC):
    """A trained difference to a matrix [d_out, d_in]."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` [..., d_out] plus the product of the difference with ``x`` [..., d_in]."""

    @abstractmethod
    def delta(self) -> Tensor:
        """Return the difference [d_out, d_in]."""

    @abstractmethod
    def scales(self) -> dict[str, float]:
        """Return the typical size of every parameter, to which its learning rate is relative."""


class LowRankAdapter(Adapter):
    """The difference ``size * B @ A``, LoRA [1]_.

    `B` starts at zero, and `A` with independent normal numbers of variance ``1 / rank``. This is
    LoRA with the factor ``1 / sqrt(rank)`` of rsLoRA [2]_, with which the size of an update does
    not depend on the rank.

    Parameters
    ----------
    shape : tuple of int
        ``(d_out, d_in)``
    rank : int
        At least 1. Where it exceeds the rank that a matrix of that shape can have, that is used.
    size : float
        Root mean square of the matrix.
    generator : torch.Generator
        On the CPU.

    References
    ----------
    .. [1] E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
       https://arxiv.org/abs/2106.09685
    .. [2] D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
       https://arxiv.org/abs/2312.03732
    """

    def __init__(
        self, shape: tuple[int, int], *, rank: int, size: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        d_out, d_in = shape
        rank = min(rank, d_out, d_in)
        self.size, self.spread = size, rank**-0.5
        self.A = nn.Parameter(torch.randn(rank, d_in, generator=generator) * self.spread)
        self.B = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y + size * x @ A.T @ B.T``."""
        p = nn.functional.linear(x, self.A)  # [..., rank]
        return y + nn.functional.linear(p * self.size, self.B)

    def delta(self) -> Tensor:
        """Return ``size * B @ A``."""
        return self.size * (self.B @ self.A)

    def scales(self) -> dict[str, float]:
        """Return those that make the difference as large as the matrix."""
        return {"A": self.spread, "B": 1.0}
