"""The nuclear norms of products of factors as a part of the loss, and the ranks that remain.

The sum of singular values is the convex measure of rank that Trained Rank Pruning adds to a loss
[1]_. Of a product it needs no decomposition,

    ||W||_* = min (||A||_F^2 + ||B||_F^2) / 2  over all factors with B A = W,

where balanced factors attain the minimum [2]_. Training shrinks small singular values most in
proportion; what is left of them is removed at the end.

References
----------
.. [1] Y. Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020.
   https://arxiv.org/abs/2004.14566
.. [2] B. Recht, M. Fazel and P. A. Parrilo, "Guaranteed Minimum-Rank Solutions of Linear Matrix
   Equations via Nuclear Norm Minimization", SIAM Review 2010, lemma 5.1.
   https://arxiv.org/abs/0706.4138
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers import CompressedLinear
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.planning.plan import Plan


class NuclearNorm:
    """A penalty on the ranks of ``low_rank`` components in floating point.

    Factors that layers share, and those of elastic checkpoints, have none.

    Parameters
    ----------
    weight : float
        Of the sum of all norms in the loss.
    root : nn.Module
        With its compressed layers.
    parameters : mapping of str to Tensor
        What is trained, by the name in `root`.
    """

    def __init__(self, weight: float, root: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._weight = weight
        layers = {n: m for n, m in root.named_modules() if isinstance(m, CompressedLinear)}
        owners = {layer.config.shares for layer in layers.values()}
        self._factors: dict[str, tuple[str, str]] = {}
        """Names of ``A`` and ``B`` by layer."""
        for name, layer in layers.items():
            for component in layer.components:
                prefix = f"{name}.{component.TYPE}"
                names = f"{prefix}.a.weight", f"{prefix}.b.weight"
                plain = isinstance(component, LowRank) and not component.config.ranks
                if plain and name not in owners and all(each in parameters for each in names):
                    self._factors[name] = names
        self._parameters = [parameters[name] for pair in self._factors.values() for name in pair]

    def __len__(self) -> int:
        return len(self._factors)

    @torch.no_grad()
    def add_gradients_(self) -> None:
        """Add the gradients of the penalty to those of the factors."""
        gradients: Any = [parameter.grad for parameter in self._parameters]
        torch._foreach_add_(gradients, self._parameters, alpha=self._weight)

    def truncated(
        self, values: Mapping[str, Tensor], tolerance: float
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Remove small singular values of all products.

        Parameters
        ----------
        values : mapping of str to Tensor
            All trained tensors.
        tolerance : float
            Fraction of the largest singular value of a product below which others are removed.

        Returns
        -------
        values : dict of str to Tensor
            Of the same shapes: the last rows and columns of factors are zero.
        ranks : dict of str to int
            By the name of the layer, where it is lower than before.
        """
        values, ranks = dict(values), {}
        for layer, (first, second) in self._factors.items():
            A, B = values[first], values[second]
            left, right = truncated_factors(B, A, tolerance)
            rank = len(right)
            if rank < len(A):
                ranks[layer] = rank
                values[first], values[second] = torch.zeros_like(A), torch.zeros_like(B)
                values[first][:rank] = right.to(A.dtype)
                values[second][:, :rank] = left.to(B.dtype)
        return values, ranks

    def cut(self, tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """Return tensors of the checkpoint without the rows and columns of zeros."""
        found = dict(tensors)
        for layer, rank in ranks.items():
            first, second = self._factors[layer]
            found[first] = found[first][:rank].contiguous()
            found[second] = found[second][:, :rank].contiguous()
        return found


def truncated_factors(B: Tensor, A: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return balanced factors of ``B A`` without its small singular values.

    Parameters
    ----------
    B : Tensor, shape [d_out, rank]
    A : Tensor, shape [rank, d_in]
    tolerance : float
        Of the largest singular value; at least one is kept.

    Returns
    -------
    B : Tensor, shape [d_out, kept], float64
    A : Tensor, shape [kept, d_in], float64
    """
    Q_out, R_out = torch.linalg.qr(B.double())
    Q_in, R_in = torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(R_out @ R_in.T)
    rank = max(1, int((tolerance * S[0] < S).sum()))
    root = S[:rank].sqrt()
    return Q_out @ (U[:, :rank] * root), (root[:, None] * Vt[:rank]) @ Q_in.T


def with_ranks(plan: Plan, ranks: Mapping[str, int]) -> Plan:
    """Return the plan with ``low_rank`` components of lower ranks, by the name of the layer."""
    results = {}
    for name in ranks.keys() & plan.results.keys():
        result = plan.results[name]
        components = tuple(
            each.with_rank(ranks[name]) if each.type == LowRank.TYPE else each
            for each in result.config.components
        )
        results[name] = replace(result, config=replace(result.config, components=components))
    return plan.with_results(results)
