"""Compressed weights as sums of products with one or two matrices, as serving engines need them.

Engines fuse layers that receive the same input (q, k and v; gate and up), divide matrices among
devices, and have kernels for some integers. `terms_of` brings every layer into one form for this,
`FusedProduct` multiplies by the terms of several layers with few products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers import CompressedLinear, QuantizationArgs
from lrc.compressors.layers.component import Component
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.packed_weight import PackedWeight
from lrc.compressors.layers.packing import dequantize
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank

Rows = slice | Tensor
"""Which rows of a matrix: a range, or indices."""


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns]: numbers, or integers with scales."""

    values: Tensor
    """Numbers, or int8 codes if `args` is given."""
    args: QuantizationArgs | None = None
    scale: Tensor | None = None
    """Shape [rows, groups]."""
    zero: Tensor | None = None
    """Codes that represent 0 [rows, groups], int8; None if symmetric."""

    @classmethod
    def of(cls, module: Any) -> "Matrix":
        """Return the matrix of a linear layer or component, quantized or not."""
        if not isinstance(module, PackedWeight) or module.packed_args is None:
            return cls(module.weight.detach())
        scale = module.get_parameter("weight_scale").detach()
        return cls(module.codes(), module.packed_args, scale, module.zero_points())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.values.shape[0], self.values.shape[1]

    def rows(self, rows: Rows) -> "Matrix":
        """Return some of the rows."""
        return replace(
            self,
            values=self.values[rows],
            scale=None if self.scale is None else self.scale[rows],
            zero=None if self.zero is None else self.zero[rows],
        )

    def columns(self, columns: slice) -> "Matrix":
        """Return a range of columns; dequantized if it divides a group that shares a scale."""
        if self.args is None or self.scale is None:
            return replace(self, values=self.values[:, columns])
        size = self.args.group_size
        if size is None:
            return replace(self, values=self.values[:, columns])
        if columns.start % size or columns.stop % size:
            return self.dequantized().columns(columns)
        groups = slice(columns.start // size, columns.stop // size)
        return replace(
            self,
            values=self.values[:, columns],
            scale=self.scale[:, groups],
            zero=None if self.zero is None else self.zero[:, groups],
        )

    def dequantized(self) -> "Matrix":
        """Return the same matrix as numbers in the dtype of the scales."""
        if self.scale is None:
            return self
        return Matrix(dequantize(self.values.contiguous(), self.scale, self.zero))

    @staticmethod
    def stack(matrices: "Sequence[Matrix]") -> "Matrix":
        """Return the rows of all matrices, whose `args` are the same."""
        if len(matrices) == 1:
            return matrices[0]
        scales = [m.scale for m in matrices if m.scale is not None]
        zeros = [m.zero for m in matrices if m.zero is not None]
        return Matrix(
            torch.cat([m.values for m in matrices]),
            matrices[0].args,
            torch.cat(scales) if scales else None,
            torch.cat(zeros) if zeros else None,
        )


@dataclass(frozen=True)
class Term:
    """A product ``y = x @ first.T``, which `second` and `order` continue if they are given."""

    first: Matrix
    second: Matrix | None = None
    """``y = p @ second.T`` with ``p = x @ first.T``."""
    order: Tensor | None = None
    """Then ``y = cat([p, p @ second.T])[..., order]``, or ``p[..., order]`` without `second`."""

    @property
    def rank(self) -> int:
        """Number of outputs of the first product."""
        return self.first.shape[0]

    def rows(self, rows: slice) -> "Term":
        """Return the term that computes a range of the outputs."""
        if self.order is not None:
            chosen = self.order[rows].long()
            if self.second is None:
                return Term(self.first, None, chosen)
            others = chosen >= self.rank  # outputs of the second product, each of which is one row
            order = chosen.clone()
            order[others] = self.rank + torch.arange(int(others.sum()), device=order.device)
            return Term(self.first, self.second.rows(chosen[others] - self.rank), order)
        if self.second is not None:
            return replace(self, second=self.second.rows(rows))
        return Term(self.first.rows(rows))

    def columns(self, columns: slice) -> "Term":
        """Return the term that uses a range of the inputs; the sum over all ranges is the whole."""
        return replace(self, first=self.first.columns(columns))


def _of_dense(component: Any) -> Term:
    return Term(Matrix.of(component))


def _of_low_rank(component: Any) -> Term:
    return Term(Matrix.of(component.first), Matrix.of(component.b))


def _of_pivoted(component: Any) -> Term:
    second = Matrix.of(component.c) if "c" in component._modules else None
    return Term(Matrix.of(component.a), second, component.order)


NATIVE: dict[type[Component], Callable[[Component], Term]] = {
    Dense: _of_dense,
    LowRank: _of_low_rank,
    PivotedLowRank: _of_pivoted,
}
"""Component types that are multiplied as they are stored -> their term."""


@torch.no_grad()
def terms_of(layer: CompressedLinear) -> tuple[list[Term], list[str]]:
    """Return terms whose sum is the weight of a layer, and the types that had to be expanded.

    Components of types that are not in `NATIVE` are added up to one dense matrix.
    """
    terms, expanded = [], []
    for component in layer.components:
        make = NATIVE.get(type(component))
        if make is None:
            expanded.append(component)
        else:
            terms.append(make(component))
    if expanded:
        whole = sum(component.matrix().float() for component in expanded)
        assert isinstance(whole, Tensor)
        dtype = next(layer.parameters()).dtype
        terms.append(Term(Matrix(whole.to(dtype))))
    return terms, [component.TYPE for component in expanded]


MakeProduct = Callable[[Matrix], nn.Module | None]
"""Returns a module that multiplies ``x`` [..., columns] by a matrix, or None if it cannot."""


class FusedProduct(nn.Module):
    """Multiply by the weights of layers that receive the same input; concatenate the results.

    The first matrices of all terms are multiplied together, those of integers with the same scheme
    in a separate product. Integers for which there is no kernel are dequantized.

    Parameters
    ----------
    layers : sequence of sequence of Term
        The terms of each layer, which are added up.
    make : callable
        Returns the module for a product.
    """

    def __init__(self, layers: Sequence[Sequence[Term]], make: MakeProduct) -> None:
        super().__init__()
        self.dequantized: list[QuantizationArgs] = []
        """Schemes without a kernel, once for each matrix."""
        terms = [term for layer in layers for term in layer]
        self._layer_of = [i for i, layer in enumerate(layers) for _ in layer]
        groups: dict[QuantizationArgs | None, list[int]] = {}
        for i, term in enumerate(terms):
            groups.setdefault(term.first.args, []).append(i)
        numbers = groups.pop(None, [])
        self.firsts = nn.ModuleList()
        self._members: list[list[int]] = []
        for members in groups.values():
            product = make(Matrix.stack([terms[i].first for i in members]))
            if product is not None:
                self._add(product, members)
                continue
            for i in members:
                single = make(terms[i].first)
                if single is None:
                    numbers.append(i)
                else:
                    self._add(single, [i])
        if numbers:
            numbers.sort()
            firsts = [self._as_numbers(terms[i].first) for i in numbers]
            self._add(self._made(make, Matrix.stack(firsts)), numbers)
        self._widths = [[terms[i].rank for i in members] for members in self._members]
        self.seconds = nn.ModuleDict()
        self._orders: list[str | None] = []
        for i, term in enumerate(terms):
            if term.second is not None:
                second = make(term.second) if term.second.args is not None else None
                if second is None:
                    second = self._made(make, self._as_numbers(term.second))
                self.seconds[str(i)] = second
            self._orders.append(None if term.order is None else f"order_{i}")
            if term.order is not None:
                self.register_buffer(f"order_{i}", term.order.int(), persistent=False)
        one_each = self._layer_of == list(range(len(layers)))
        plain = not self.seconds and not any(self._orders)
        self._single = len(self.firsts) == 1 and one_each and plain

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., sum of all d_out]."""
        if self._single:
            whole: Tensor = self.firsts[0](x)
            return whole
        found: dict[int, Tensor] = {}
        for product, members, widths in zip(self.firsts, self._members, self._widths, strict=True):
            p = product(x)
            parts = [p] if len(widths) == 1 else p.split(widths, dim=-1)
            for i, part in zip(members, parts, strict=True):
                found[i] = self._continued(i, part)
        outputs: dict[int, Tensor] = {}
        for i, layer in enumerate(self._layer_of):
            outputs[layer] = outputs[layer] + found[i] if layer in outputs else found[i]
        return torch.cat(list(outputs.values()), dim=-1)

    def _continued(self, i: int, p: Tensor) -> Tensor:
        """Return the outputs of term `i` from those of its first product."""
        key, order = str(i), self._orders[i]
        if key in self.seconds:
            p = p.contiguous()
            y: Tensor = self.seconds[key](p)
            p = y if order is None else torch.cat([p, y], dim=-1)
        return p if order is None else p.index_select(-1, self.get_buffer(order))

    def _add(self, product: nn.Module, members: list[int]) -> None:
        self.firsts.append(product)
        self._members.append(members)

    def _as_numbers(self, matrix: Matrix) -> Matrix:
        if matrix.args is not None:
            self.dequantized.append(matrix.args)
        return matrix.dequantized()

    @staticmethod
    def _made(make: MakeProduct, matrix: Matrix) -> nn.Module:
        product = make(matrix)
        assert product is not None, "numbers can always be multiplied"
        return product
