"""A gather along the last dimension whose gradient is a gather, too."""

from typing import Any

import torch
from torch import Tensor


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(-1, inverse), None, None


def permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return ``x[..., order]`` for a permutation.

    The gradient of `index_select` adds numbers one by one, because indices may be repeated, and
    sorts them first if the result has to be deterministic. With the inverse permutation it is a
    gather.

    Parameters
    ----------
    x : Tensor, shape [..., n]
    order, inverse : Tensor, shape [n], int32 or int64
    """
    found: Tensor = _Permuted.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return found
