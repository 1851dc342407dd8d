"""A linear layer as the product of two thinner ones: ``y = b(a(x))``."""

from typing import Self

import torch
from torch import Tensor, nn

SENTINEL_BITS = 8


class LowRank(nn.Module):
    """Compute ``y = x @ (B @ A).T + bias`` as two products, never forming ``B @ A``.

    The factors are plain `nn.Linear` children, so that adapters (PEFT, target ``a`` and ``b``) and
    weight quantizers find them. `weight` is a sentinel of one byte under the name of the dense
    weight: a loader that does not know this layer meets a shape mismatch and stops, where it would
    otherwise start from random weights with no more than a warning.

    Parameters
    ----------
    d_in, d_out, rank : int
    bias : bool
        Whether ``b`` has a bias; it is the bias of the layer that was replaced.
    device, dtype : optional
        As for `nn.Linear`. Weights are left uninitialised.
    """

    weight: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = d_in, d_out, rank
        self.a = _empty_linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.b = _empty_linear(rank, d_out, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.zeros(1, dtype=torch.uint8, device=device))

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Self:
        """Build the layer that holds ``B`` [d_out, rank] and ``A`` [rank, d_in]."""
        layer = cls(
            A.shape[1],
            B.shape[0],
            A.shape[0],
            bias=bias is not None,
            device=A.device,
            dtype=A.dtype,
        )
        with torch.no_grad():
            layer.a.weight.copy_(A)
            layer.b.weight.copy_(B)
            if bias is not None:
                layer.b.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = self.b(self.a(x))
        return y

    def dense(self) -> nn.Linear:
        """Return the ordinary linear layer that computes the same function."""
        W = (self.b.weight.float() @ self.a.weight.float()).to(self.a.weight.dtype)
        linear = _empty_linear(
            self.in_features,
            self.out_features,
            bias=self.b.bias is not None,
            device=W.device,
            dtype=W.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(W)
            if self.b.bias is not None:
                linear.bias.copy_(self.b.bias)
        return linear

    def extra_repr(self) -> str:
        """Show the three sizes in a printed model."""
        return f"d_in={self.in_features}, d_out={self.out_features}, rank={self.rank}"

    @staticmethod
    def stored_bits(d_out: int, d_in: int, rank: int, *, bits: int) -> int:
        """Count the bits in the file that stand for the weight; `bits` is of one number."""
        return rank * (d_out + d_in) * bits + SENTINEL_BITS


def _empty_linear(
    d_in: int,
    d_out: int,
    *,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear:
    """Make a linear layer without spending time on initial values."""
    linear: nn.Linear = nn.utils.skip_init(
        nn.Linear, d_in, d_out, bias=bias, device=device or "cpu", dtype=dtype
    )
    return linear
