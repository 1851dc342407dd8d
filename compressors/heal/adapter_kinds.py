"""The values of the option `train` that train adapters: which matrices get which adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lrc.compressors.heal.adapted_matrices import AdaptedMatrix
from lrc.compressors.heal.adapters import Adapter, LowRankAdapter


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


ADAPTERS: dict[str, Callable[[nn.Module, Mapping[str, AdaptedMatrix], Any], Sites]] = {
    "lora": low_rank_sites,
}
"""Value of `train` -> what returns the matrices of a model or a decoder layer that are adapted."""
