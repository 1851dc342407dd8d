"""A linear layer as a product of low rank and entries beside it: ``y = low(x) + M x``."""

from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrc.compressors.layers.bits import pack_bits, packed_width, spread
from lrc.compressors.layers.form import Shapes, Sizes, Spec
from lrc.compressors.layers.parts import Device
from lrc.compressors.layers.pivoted import Pivoted


class LowRankPlusSparse(Pivoted):
    """Compute ``y = x @ (B @ A + M).T + bias``: the product by pivot rows, M by values and a mask.

    Both parts are stored, and computed, as `PivotedLowRank` and `Sparse` do it: this form saves
    bytes, and costs more arithmetic than the dense layer. What rounding does to the product is not
    larger than what it does to the values: beside them it holds a few percents of the energy.

    Parameters are those of `Form`; `nonzeros` counts the values of the whole matrix.
    """

    SIZES = ("rank", "nonzeros")
    RATIOS: ClassVar[tuple[float, ...]] = (0.1,)
    nonzeros: int
    mask: Tensor

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        super()._build(bias=bias, device=device, dtype=dtype)
        d_in, d_out = self.in_features, self.out_features
        self.values = nn.Parameter(torch.empty(self.nonzeros, device=device, dtype=dtype))
        mask = torch.empty(d_out, packed_width(d_in), dtype=torch.uint8, device=device)
        self.register_buffer("mask", mask)

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module: those of the product, values and mask."""
        nonzeros = spec["nonzeros"]
        if nonzeros > d_out * d_in:
            raise ValueError(
                f"nonzeros must be in [1, {d_out * d_in}] for [{d_out}, {d_in}], got {nonzeros}"
            )
        tensors = super().shapes(d_out, d_in, spec, bias=bias)
        tensors["values"] = [nonzeros], None
        tensors["mask"] = [d_out, packed_width(d_in)], torch.uint8
        return tensors

    @classmethod
    def largest_step(cls, d_out: int, d_in: int) -> int:
        """Return the number of entries."""
        return d_out * d_in

    @classmethod
    def sizes_at(cls, step: int, d_out: int, d_in: int, ratio: float = 2.0) -> Sizes:
        """Return so many values, and the largest rank whose numbers are at most `ratio` of them.

        But for a rank of 1, which is always there; a ratio of 1 or more allows all ranks at last.
        """
        sides, numbers = d_out + d_in, int(ratio * step)
        rank = min(d_out, d_in)
        if numbers < d_out * d_in:  # rank * (sides - rank) <= numbers
            rank = (sides - isqrt(sides**2 - 4 * numbers - 1) - 1) // 2
        return {"rank": max(rank, 1), "nonzeros": step}

    @classmethod
    def written(cls, d_out: int, d_in: int, sizes: Sizes) -> str:
        """Return the rank, and the share of the entries that are stored beside it."""
        return f"{sizes['rank']} and {sizes['nonzeros'] / (d_out * d_in):.1%} of entries"

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count those of the product, and of the dense one that the entries take."""
        return d_out * d_in + super().multiply_adds(d_out, d_in, **sizes)

    @staticmethod
    def encode(B: Tensor, A: Tensor, M: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Write ``B @ A`` and the entries of `M` [d_out, d_in] that `mask` [d_out, d_in] keeps.

        Parameters and errors are those of `Pivoted.encode_product`.
        """
        return Pivoted.encode_product(B, A) | {"values": M[mask], "mask": pack_bits(mask)}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        return super().forward(x) + nn.functional.linear(x, self._entries())

    def product(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float32."""
        return super().product() + self._entries().float()

    def _entries(self) -> Tensor:
        return spread(self._numbers(), self.mask, self.in_features)
