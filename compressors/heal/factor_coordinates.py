"""Coordinates in which the two factors of a matrix are trained.

A matrix ``B A`` does not change if its factors become ``B M^-1`` and ``M A``, but the steps of
gradient descent do. Pivot rows are an extreme choice: the coefficients of the other rows multiply
every change of them. So each factor is trained in coordinates in which the other one is orthonormal
at first, and a change of a factor is as large as that of the matrix: the scaled gradients of [1]_
with the factors at the start, for any optimizer [2]_.

References
----------
.. [1] T. Tong, C. Ma and Y. Chi, "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via
   Scaled Gradient Descent", JMLR 2021. https://arxiv.org/abs/2005.08898
.. [2] F. Zhang and M. Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
   ICML 2024. https://arxiv.org/abs/2402.02347
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrc.compressors.layers.component import Component
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank

DAMP = 1e-2
"""Of the mean square of the other factor, for directions that it hardly uses."""


@dataclass(frozen=True)
class Coordinates:
    """Coordinates ``z`` of a parameter ``p``: ``p = T^T z``, or ``p = z T`` on the right side."""

    transform: Tensor
    """[rank, rank], in the dtype in which the parameter is trained."""
    right: bool
    size: float
    """Root mean square of the coordinates at first."""

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to the coordinates."""
        return gradient @ self.transform.T if self.right else self.transform @ gradient

    def of_parameter(self, change: Tensor) -> Tensor:
        """Return the change of the parameter for a change of its coordinates."""
        return change @ self.transform if self.right else self.transform.T @ change


def factor_coordinates(
    root: nn.Module, parameters: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Coordinates]:
    """Return the coordinates of all factors whose partner is trained, too.

    Parameters
    ----------
    root : nn.Module
        With its compressed layers.
    parameters : mapping of str to Tensor
        What is trained, by `prefix` and the name in `root`. Factors that layers share, and those
        of elastic checkpoints, whose order matters, have none.
    """
    found = {}
    for path, component in root.named_modules():
        if not isinstance(component, LowRank | PivotedLowRank) or not _is_pair(component):
            continue
        last = "c" if isinstance(component, PivotedLowRank) else "b"
        names = [f"{prefix}{path}.{leaf}.weight" for leaf in ("a", last)]
        if not all(name in parameters for name in names):
            continue
        A, B = (parameters[name].detach().double() for name in names)
        of_outputs, of_inputs = B.T @ B, A @ A.T  # [rank, rank]
        if isinstance(component, PivotedLowRank):  # the pivot rows themselves are outputs, too
            of_outputs += torch.eye(len(A), dtype=A.dtype, device=A.device)
        found[names[0]] = _coordinates(parameters[names[0]], of_outputs, right=False)
        found[names[1]] = _coordinates(parameters[names[1]], of_inputs, right=True)
    return found


def _is_pair(component: Component) -> bool:
    config = component.config
    return config.shares is None and config.quantization is None and not config.ranks


def _coordinates(parameter: Tensor, gram: Tensor, *, right: bool) -> Coordinates:
    """Return coordinates of a factor whose partner has a Gram matrix [rank, rank] in float64."""
    factor, dtype = parameter.detach().double(), torch.promote_types(parameter.dtype, torch.float32)
    damp = DAMP * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    L = torch.linalg.cholesky(gram + damp * identity)
    coordinates = factor @ L if right else L.T @ factor
    transform = torch.linalg.solve_triangular(L, identity, upper=False)
    size = float(coordinates.square().mean().sqrt())
    return Coordinates(transform.to(dtype), right, size)
