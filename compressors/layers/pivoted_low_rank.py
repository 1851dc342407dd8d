"""A low-rank matrix as some of its rows and the coefficients of the others."""

import torch
from torch import Tensor, nn

from lrc.compressors.layers.component import Component, ComponentConfig, check_range
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.pivot_rows import pivot_rows
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs

INT16_ROWS = 2**15 - 1
"""Largest number of rows that int16 can index."""


class PivotedLowRank(Component):
    """Pivot rows ``R`` of a matrix of rank r, and coefficients ``C`` of the other rows.

    The outputs of the pivot rows are ``p = R x``, the others ``C p``. That is ``rank**2`` fewer
    numbers and multiplications than two factors need for the same matrix, at the price of `d_out`
    indices [1]_. Converting to bfloat16 changes the matrix by about 1 %, four times as much as with
    two factors: 0.01 % of its squared norm, while truncation removes whole percents.

    At rank `d_out` every row is a pivot row and there is no ``c``.

    References
    ----------
    .. [1] J. Zhao et al., "Pivoting Factorization: A Compact Meta Low-Rank Representation of
       Sparsity for Efficient Inference in Large Language Models", 2025.
       https://arxiv.org/abs/2501.19090
    """

    TYPE = "pivoted_low_rank"
    SIZES = ("rank",)

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return pivot rows ``a``, coefficients ``c`` and the ``order`` of the rows."""
        rank = config.sizes["rank"]
        check_range("rank", rank, d_out, d_out, d_in)
        specs = {"a.weight": TensorSpec([rank, d_in], role="matrix")}
        if rank < d_out:  # offloading to disk cannot map an empty tensor
            specs["c.weight"] = TensorSpec([d_out - rank, rank], role="matrix")
        return specs | {"order": TensorSpec([d_out], _index_dtype(d_out))}

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, config: ComponentConfig) -> int:
        """Return those of the two products."""
        rank = config.sizes["rank"]
        return rank * (d_out + d_in - rank)

    @staticmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Find the pivot rows of ``B @ A``.

        Raises
        ------
        ValueError
            If the columns of `B` are numerically dependent, see `pivot_rows`.
        """
        R, C, order = pivot_rows(B, A)
        tensors = {"a.weight": R, "order": order.to(_index_dtype(len(order)))}
        return tensors | ({"c.weight": C} if len(C) else {})

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        p = self._part("a")(x)  # [..., rank]
        y = torch.cat([p, self._part("c")(p)], dim=-1) if "c" in self._modules else p
        return y.index_select(-1, self.get_buffer("order").int())  # int16 is not supported

    def matrix(self) -> Tensor:
        """Return the matrix [d_out, d_in] in float32."""
        R = self._part("a").weight.float()
        rows = torch.cat([R, self._part("c").weight.float() @ R]) if "c" in self._modules else R
        return rows.index_select(0, self.get_buffer("order").int())

    def problems(self) -> list[str]:
        """Return violated invariants: `order` must be a permutation of the rows."""
        order = self.get_buffer("order").long()
        expected = torch.arange(self.d_out, device=order.device)
        ok = torch.equal(order.sort().values, expected)
        return super().problems() + ([] if ok else ["order is not a permutation of the rows"])

    def _part(self, name: str) -> nn.Linear | PackedLinear:
        part = self.get_submodule(name)
        return part  # type: ignore[return-value]


def _index_dtype(d_out: int) -> torch.dtype:
    return torch.int16 if d_out <= INT16_ROWS else torch.int32
