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


class SliceAdapter(Adapter):
    """A difference in some rows or columns only.

    Parameters
    ----------
    shape : tuple of int
        ``(d_out, d_in)``
    dim : {0, 1}
        0 for rows, 1 for columns.
    places : Tensor, shape [n], int64
        The rows or columns.
    size : float
        Root mean square of the matrix.
    """

    places: Tensor

    def __init__(self, shape: tuple[int, int], *, dim: int, places: Tensor, size: float) -> None:
        super().__init__()
        self._shape, self._dim, self._size = shape, dim, size
        d_out, d_in = shape
        self.register_buffer("places", places)
        n = len(places)
        self.slice = nn.Parameter(torch.zeros((n, d_in) if dim == 0 else (d_out, n)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with the product of the slice added; only inputs of columns are kept."""
        if self._dim == 1:
            return y + nn.functional.linear(x.index_select(-1, self.places), self.slice)
        return y.index_add(-1, self.places, nn.functional.linear(x, self.slice).to(y.dtype))

    def delta(self) -> Tensor:
        """Return a matrix of zeros with the slice."""
        zeros = self.slice.new_zeros(self._shape)
        return zeros.index_add(self._dim, self.places, self.slice)

    def scales(self) -> dict[str, float]:
        """Return the size of the matrix."""
        return {"slice": self._size}


class KroneckerAdapter(Adapter):
    """The difference ``size * sum_i A_i (x) (s_i @ t_i)``, a parameterized hypercomplex product.

    It is the weight of the layers of Compacter [1]_, which puts two of them around a nonlinearity;
    here it is added to a matrix. `s` starts at zero, the others with independent normal numbers.

    Parameters
    ----------
    shape : tuple of int
        ``(d_out, d_in)``, multiples of n.
    A : nn.Parameter, shape [n, n, n]
        One matrix [n, n] per term; adapters may share them.
    rank : int
        Rank of the products ``s_i @ t_i``.
    size : float
        Root mean square of the matrix.
    generator : torch.Generator
        On the CPU.

    References
    ----------
    .. [1] R. Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
       NeurIPS 2021. https://arxiv.org/abs/2106.04647
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        A: nn.Parameter,
        rank: int,
        size: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        n = len(A)
        d_out, d_in = shape[0] // n, shape[1] // n
        rank = min(rank, d_out, d_in)
        self.size, self.spread = size, rank**-0.5
        self.A = A
        self.s = nn.Parameter(torch.zeros(n, d_out, rank))
        self.t = nn.Parameter(torch.randn(n, rank, d_in, generator=generator) * self.spread)

    @staticmethod
    def new_terms(n: int, generator: torch.Generator, device: torch.device) -> nn.Parameter:
        """Return new matrices `A` for `n` terms [n, n, n]."""
        A = torch.randn(n, n, n, generator=generator) * n**-0.5
        return nn.Parameter(A.to(device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with the product added, without the Kronecker products."""
        parts = x.unflatten(-1, (len(self.A), -1))  # [..., n, d_in / n]
        p = torch.einsum("...qv,irv->...iqr", parts, self.t)
        p = torch.einsum("ipq,...iqr->...ipr", self.A, p)
        product = torch.einsum("iur,...ipr->...pu", self.s * self.size, p)  # [..., n, d_out / n]
        return y + product.flatten(-2)

    def delta(self) -> Tensor:
        """Return the sum of Kronecker products."""
        terms = torch.einsum("ipq,iur,irv->puqv", self.A, self.s, self.t)
        return self.size * terms.flatten(2).flatten(0, 1)

    def scales(self) -> dict[str, float]:
        """Return those that make the difference as large as the matrix."""
        return {"A": len(self.A) ** -0.5, "s": 1.0, "t": self.spread}
