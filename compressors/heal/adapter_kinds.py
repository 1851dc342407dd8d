"""The values of the option `train` that train adapters: which matrices get which adapter."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from lrc.compressors.heal.adapted_matrices import AdaptedMatrix
from lrc.compressors.heal.adapters import Adapter, LowRankAdapter


class AdapterKind(Protocol):
    """What a value of `train` adds to matrices.

    `options` are those of the method.
    """

    def __init__(self, options: Any) -> None: ...

    def select(self, matrices: Mapping[str, AdaptedMatrix]) -> dict[str, AdaptedMatrix]:
        """Return those of the matrices, by the names of their tensors, that get an adapter."""

    def adapter(self, name: str, matrix: AdaptedMatrix, generator: torch.Generator) -> Adapter:
        """Return a new adapter."""


class Lora:
    """Low-rank adapters on all matrices."""

    def __init__(self, options: Any) -> None:
        self._rank = options.adapter_rank

    def select(self, matrices: Mapping[str, AdaptedMatrix]) -> dict[str, AdaptedMatrix]:
        """Return all matrices."""
        return dict(matrices)

    def adapter(self, name: str, matrix: AdaptedMatrix, generator: torch.Generator) -> Adapter:
        """Return a low-rank adapter."""
        return LowRankAdapter(matrix.shape, rank=self._rank, size=matrix.size, generator=generator)


ADAPTERS: dict[str, Callable[[Any], AdapterKind]] = {"lora": Lora}
"""Values of `train` that train adapters."""
