"""A linear layer as the product of two thinner ones: ``y = b(a(x))``."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from lrc.compressors.layers.form import Shapes, Spec
from lrc.compressors.layers.parts import SENTINEL, Device, empty_linear, sentinel
from lrc.compressors.layers.rank_form import RankForm


class LowRank(RankForm):
    """Compute ``y = x @ (B @ A).T + bias`` as two products, never forming ``B @ A``.

    Parameters are those of `Form`; a bias is that of ``b``.
    """

    BIAS = "b.bias"

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        d_in, d_out, rank = self.in_features, self.out_features, self.rank
        self.a = empty_linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.b = empty_linear(rank, d_out, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Self:
        """Build the layer that holds ``B`` [d_out, rank] and ``A`` [rank, d_in]."""
        layer = cls(
            A.shape[1],
            B.shape[0],
            rank=A.shape[0],
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

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module: two factors, and the bias with the second."""
        rank = spec["rank"]
        tensors: Shapes = {**SENTINEL, "a.weight": ([rank, d_in], None)}
        tensors["b.weight"] = [d_out, rank], None
        if bias or spec.get("bias"):
            tensors[cls.BIAS] = [d_out], None
        return tensors

    @classmethod
    def dense_shape(cls, name: str, spec: Spec, found: Mapping[str, list[int]]) -> tuple[int, int]:
        """Read ``(d_out, d_in)`` off the two factors."""
        return found[f"{name}.b.weight"][0], found[f"{name}.a.weight"][1]

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count those of the two products."""
        return sizes["rank"] * (d_out + d_in)

    @staticmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Return the two factors as they are."""
        return {"weight": sentinel(A), "a.weight": A, "b.weight": B}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = self.b(self.a(x))
        return y

    def product(self) -> Tensor:
        """Return ``B @ A`` [d_out, d_in] in float32."""
        return self.b.weight.float() @ self.a.weight.float()
