"""A linear layer as some of its rows and how the others follow: ``y = [a(x), c(a(x))]``, sorted."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrc.compressors.layers.form import Form, Shapes, Spec
from lrc.compressors.layers.parts import SENTINEL, Device, empty_linear, sentinel
from lrc.compressors.layers.pivot_rows import pivot_rows
from lrc.compressors.layers.rank_form import RankForm

INT16_ROWS = 2**15 - 1
"""Rows that an int16 can number and count."""


class Pivoted(Form):
    """A product of low rank by its pivot rows R and coefficients C: what forms with one share.

    A rank of `d_out` is possible; then every row is a pivot and there is no ``c``.
    """

    BIAS = "bias"
    rank: int
    order: Tensor

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        d_in, d_out, rank = self.in_features, self.out_features, self.rank
        self.a = empty_linear(d_in, rank, bias=False, device=device, dtype=dtype)
        # Not a linear of no rows: offloading to disk cannot map an empty file.
        self.c = (
            empty_linear(rank, d_out - rank, bias=False, device=device, dtype=dtype)
            if rank < d_out
            else None
        )
        # A parameter of its own, since `c` makes only some of the outputs, in another order.
        self.bias = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None
        # Stays an integer whatever the model is converted to: torch and transformers convert
        # floating tensors only.
        order = torch.empty(d_out, dtype=_index_dtype(d_out), device=device)
        self.register_buffer("order", order)

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module: pivot rows, coefficients and the order of the rows."""
        rank = spec["rank"]
        if rank > d_out:
            raise ValueError(f"rank must be in [1, {d_out}] for [{d_out}, {d_in}], got {rank}")
        tensors: Shapes = {**SENTINEL, "a.weight": ([rank, d_in], None)}
        if rank < d_out:
            tensors["c.weight"] = [d_out - rank, rank], None
        tensors["order"] = [d_out], _index_dtype(d_out)
        if bias or spec.get("bias"):
            tensors[cls.BIAS] = [d_out], None
        return tensors

    @classmethod
    def dense_shape(cls, name: str, spec: Spec, found: Mapping[str, list[int]]) -> tuple[int, int]:
        """Read ``(d_out, d_in)`` off the order and the pivot rows."""
        return found[f"{name}.order"][0], found[f"{name}.a.weight"][-1]

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count those of the two products."""
        rank = sizes["rank"]
        return rank * (d_out + d_in - rank)

    @staticmethod
    def encode_product(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Find the pivot rows of ``B @ A``.

        Raises
        ------
        ValueError
            If B is numerically of lower rank than it has columns: what `pivot_rows` says.
        """
        R, C, order = pivot_rows(B, A)
        tensors = {"weight": sentinel(A), "a.weight": R}
        if len(C):
            tensors["c.weight"] = C
        return tensors | {"order": order.to(_index_dtype(len(order)))}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        p = self.a(x)  # [..., rank]
        y = p if self.c is None else torch.cat([p, self.c(p)], dim=-1)  # [..., d_out]
        y = y.index_select(-1, self.order.int())  # takes no int16
        return y if self.bias is None else y + self.bias

    def product(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float32."""
        R = self.a.weight.float()
        rows = R if self.c is None else torch.cat([R, self.c.weight.float() @ R])
        return rows.index_select(0, self.order.int())


class PivotedLowRank(Pivoted, RankForm):
    """Compute ``y = x @ W_hat.T + bias`` from the pivot rows R of ``W_hat`` and coefficients C.

    Outputs of the pivot rows are ``p = R x``; the others are combinations of them, ``C p``. That is
    ``rank**2`` less work than with two factors of the same product, and as many numbers less to
    store, for `d_out` indices more. Rounding it to bfloat16 moves the product by about 1 %, four
    times as far as rounding two factors does: 0.01 % of its energy, where truncation takes whole
    percents.

    Parameters are those of `Form`.

    References
    ----------
    .. [1] "Pivoting Factorization: A Compact Meta Low-Rank Representation of Sparsity for Efficient
       Inference in Large Language Models", 2025. https://arxiv.org/abs/2501.19090
    """

    @staticmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Find the pivot rows of the product; raises as `encode_product`."""
        return Pivoted.encode_product(B, A)


def _index_dtype(d_out: int) -> torch.dtype:
    return torch.int16 if d_out <= INT16_ROWS else torch.int32
