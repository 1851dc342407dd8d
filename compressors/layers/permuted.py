"""A permutation along a dimension whose gradient is a gather, too."""

from typing import Any

import torch
from torch import Tensor


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim = dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(ctx.dim, inverse), None, None, None


def permuted(x: Tensor, order: Tensor, inverse: Tensor, dim: int = -1) -> Tensor:
    """Return ``x[..., order]``, or the same along another dimension, for a permutation.

    The gradient of `index_select` adds numbers one by one, because indices may be repeated, and
    sorts them first if the result has to be deterministic. With the inverse permutation it is a
    gather.

    Parameters
    ----------
    x : Tensor, shape [..., n]
    order, inverse : Tensor, shape [n], int32 or int64
    dim : int
    """
    found: Tensor = _Permuted.apply(x, order, inverse, dim)  # type: ignore[no-untyped-call]
    return found
