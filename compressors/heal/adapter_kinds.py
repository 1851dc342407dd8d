"""The values of the option `train` that train adapters: which matrices get which adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lrc.compressors.heal.adapted_matrices import AdaptedMatrix, FloatMatrix
from lrc.compressors.heal.adapters import Adapter, KroneckerAdapter, LowRankAdapter
from lrc.compressors.heal.slices import sliced_matrices


@dataclass(frozen=True)
class AdapterSite:
    """A matrix, and how the adapter that it gets is made."""

    matrix: AdaptedMatrix
    make: Callable[[torch.Generator], Adapter]


Sites = dict[str, AdapterSite]
"""By the name of the stored tensor, or of the layer that gets a component."""


def low_rank_sites(root: nn.Module, matrices: Mapping[str, AdaptedMatrix], options: Any) -> Sites:
    """Return all matrices, for low-rank adapters."""

    def make(matrix: AdaptedMatrix, generator: torch.Generator) -> Adapter:
        return LowRankAdapter(
            matrix.shape, rank=options.adapter_rank, size=matrix.size, generator=generator
        )

    return {name: AdapterSite(each, partial(make, each)) for name, each in matrices.items()}


def slice_sites(root: nn.Module, matrices: Mapping[str, AdaptedMatrix], options: Any) -> Sites:
    """Return dense 16-bit matrices, for slices of common channels and heads."""
    found = sliced_matrices(root, matrices, options)
    return {name: AdapterSite(matrix, make) for name, (matrix, make) in found.items()}


def kronecker_sites(root: nn.Module, matrices: Mapping[str, AdaptedMatrix], options: Any) -> Sites:
    """Return the 16-bit matrices whose sides are multiples of the number of terms."""
    n, shared = options.terms, dict[str, nn.Parameter]()

    def make(name: str, matrix: AdaptedMatrix, generator: torch.Generator) -> Adapter:
        key = "" if options.share else name
        if key not in shared:
            shared[key] = KroneckerAdapter.new_terms(n, generator)
        return KroneckerAdapter(
            matrix.shape,
            A=shared[key],
            rank=options.adapter_rank,
            size=matrix.size,
            generator=generator,
        )

    return {
        name: AdapterSite(each, partial(make, name, each))
        for name, each in matrices.items()
        if isinstance(each, FloatMatrix) and not any(side % n for side in each.shape)
    }


ADAPTERS: dict[str, Callable[[nn.Module, Mapping[str, AdaptedMatrix], Any], Sites]] = {
    "lora": low_rank_sites,
    "s2ft": slice_sites,
    "compacter": kronecker_sites,
}
"""Value of `train` -> what returns the matrices of a model or a decoder layer that are adapted."""
