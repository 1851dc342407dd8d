"""Products with a frozen matrix that is computed from stored tensors, for training of adapters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.kernels.fast_path import needs_gradients


class _Product(torch.autograd.Function):
    """``x @ matrix().T`` whose backward calculates the matrix a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Callable[[], Tensor]) -> Tensor:
        ctx.matrix = matrix
        return nn.functional.linear(x, matrix())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients  # [..., d_out]
        return gradient @ ctx.matrix().to(gradient.dtype), None


def product(x: Tensor, matrix: Callable[[], Tensor], module: nn.Module) -> Tensor:
    """Map ``x`` [..., d_in] to [..., d_out].

    Autograd would keep the whole matrix for the gradient of `x`, in all layers at once, which takes
    as much memory as the dense model. If `x` alone has a gradient, as in training of adapters, it
    is computed again in the backward pass.

    Parameters
    ----------
    x : Tensor, shape [..., d_in]
    matrix : callable
        Returns the matrix [d_out, d_in].
    module : nn.Module
        Has the tensors that `matrix` reads.
    """
    frozen = needs_gradients(x) and not any(p.requires_grad for p in module.parameters())
    # Hooks of offloaded weights remove them after the forward pass.
    if frozen and not torch.compiler.is_compiling() and not hasattr(module, "_hf_hook"):
        y: Tensor = _Product.apply(x, matrix)  # type: ignore[no-untyped-call]
        return y
    return nn.functional.linear(x, matrix())
