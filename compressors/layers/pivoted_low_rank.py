"""A low-rank matrix as some of its rows and the coefficients of the others."""

import torch
from torch import Tensor, nn

from lrc.compressors.kernels import FastPath, Need, needs_gradients, run_or_restore, select
from lrc.compressors.kernels.pivoted import TRANSPOSE_FROM, interleave_by_rows, inverse_of
from lrc.compressors.layers.assembled import is_assembled
from lrc.compressors.layers.component import Component, ComponentConfig, check_range, is_plain
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.permuted import permuted
from lrc.compressors.layers.pivot_rows import pivot_rows
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs
from lrc.compressors.layers.tiles import exceeds, in_tiles

INT16_ROWS = 2**15 - 1
"""Largest number of rows that int16 can index."""


class PivotedLowRank(FastPath, Component):
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

    def _select(self) -> str | None:
        args, order = self.config.quantization, self.get_buffer("order")
        if "c" not in self._modules:
            return None
        like = next(self._part("c").parameters())
        if order.is_meta or like.is_meta:
            return "the weights are offloaded"
        codec, shape = "float" if args is None else args.bits, (self.d_out, self.d_in)
        found = select(Need("pivoted_rows", codec, order.device, like.dtype, shape))
        if isinstance(found, str):
            return None if order.is_cpu else found  # see `_outputs`
        self._derive(inverse=inverse_of(order))
        self.entry = found
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        if self.tile is not None and exceeds(x, self.tile):
            return in_tiles(lambda rows: self._outputs(self._part("a")(rows)), x, self.tile)
        if torch.is_grad_enabled() and "c" in self._modules:
            a, c = self._part("a"), self._part("c")
            if is_assembled(x, a, c, (self.d_out, self.d_in)):
                return nn.functional.linear(x, self._assembled(a.weight, c.weight))
        return self._outputs(self.multiply_a(x))

    def _assembled(self, R: Tensor, C: Tensor) -> Tensor:
        """Return the matrix [d_out, d_in] of pivot rows and coefficients, with gradients."""
        order, inverse = self._permutation()
        return permuted(torch.cat([R, C @ R]), order, inverse, dim=0)

    def _permutation(self) -> tuple[Tensor, Tensor]:
        """Return `order` and its inverse, which gradients need, in int32."""
        order = self.get_buffer("order")
        if "inverse" not in self._derived:
            self._derive(inverse=inverse_of(order))
        return order.int(), self.get_buffer("inverse")

    def _outputs(self, p: Tensor) -> Tensor:
        """Map outputs ``p`` [..., rank] of the pivot rows to all outputs [..., d_out]."""
        order = self.get_buffer("order")
        if "c" not in self._modules:
            return p.index_select(-1, order.int())  # int16 is not supported
        c = self._part("c")
        rows = p.reshape(-1, p.shape[-1])  # [n, rank]
        weight = c.weight if type(c) is nn.Linear and is_plain(c) else None
        like = next(c.parameters()) if weight is None else weight
        # Parameters of adapters may have gradients, too.
        if self.is_fast(p, like) and not (weight is None and torch.is_grad_enabled()):
            inverse = self.get_buffer("inverse")
            y: Tensor | None = run_or_restore(self, rows, c, weight, order, inverse)
            if y is not None:
                return y.view(*p.shape[:-1], self.d_out)
        # Compiled code for a CPU needs no choice by the number of rows: it fuses the gather.
        transposed = weight is not None and p.is_cpu and not torch.compiler.is_compiling()
        if transposed and len(rows) >= TRANSPOSE_FROM:
            return interleave_by_rows(rows, like, order).view(*p.shape[:-1], self.d_out)
        joined = torch.cat([p, c(p)], dim=-1)
        if not needs_gradients(joined) or torch.compiler.is_compiling():
            return joined.index_select(-1, order.int())
        return permuted(joined, *self._permutation())

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
