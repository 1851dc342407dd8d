"""Preconditioned conjugate gradients on tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


def conjugate_gradients(
    operator: Operator,
    x: Tensor,
    residual: Tensor,
    *,
    steps: int,
    precondition: Operator = lambda r: r,
    dim: int | tuple[int, ...] | None = None,
    floor: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Solve ``operator(x) == b`` approximately, in a fixed number of steps.

    Returns the solution and its residual ``b - operator(x)``, over all entries including masked
    ones.

    Parameters
    ----------
    operator : callable
        Linear, symmetric and positive semi-definite map of tensors of the shape of `x`.
    x, residual : Tensor
        Starting point, and its residual.
    steps : int
        Number of steps; each applies `operator` once.
    precondition : callable
        Symmetric positive semi-definite approximation of the inverse. Entries of `x` for which it
        returns zero do not change: a preconditioner with a mask solves the problem on the mask.
    dim : int or tuple of int, optional
        Dimensions of the unknowns in a batch of independent problems. Default: one problem.
    floor : Tensor or float
        A problem whose squared preconditioned residual is not above this is not changed any more.
        This is decided by a mask, without synchronization with a GPU.
    """
    one = dim is None or (isinstance(dim, tuple) and len(dim) == x.ndim)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        if one and x.is_cuda:  # one kernel; on a CPU, the sum of products is more accurate
            return torch.dot(a.flatten(), b.flatten())
        return (a * b).sum(dim=dim, keepdim=dim is not None)

    direction = precondition(residual)
    size = inner(residual, direction)
    for _ in range(steps):
        image = operator(direction)
        curvature = inner(direction, image)
        live = (size > floor) & (curvature > 0)
        step = torch.where(live, size / curvature, 0)
        x = torch.addcmul(x, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        z = precondition(residual)
        before, size = size, inner(residual, z)
        direction = torch.addcmul(z, torch.where(live, size / before, 0), direction)
    return x, residual
