"""Adapters that are not merged: a low-rank component next to the integers of a weight."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.heal.adapted_integers import IntegerMatrix
from lrc.compressors.heal.adapted_matrices import AdaptedMatrix
from lrc.compressors.heal.adapters import Adapter, LowRankAdapter
from lrc.compressors.layers import (
    ComponentConfig,
    CompressedEmbedding,
    CompressedLinear,
    WeightConfig,
)
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.planning.plan import Plan


def takes_component(config: WeightConfig) -> bool:
    """Return whether a weight has integers that a low-rank component can be added to."""
    types = {c.type for c in config.components}
    return config.quantization is not None and LowRank.TYPE not in types and config.shares is None


def with_component(config: WeightConfig, rank: int) -> WeightConfig:
    """Return the configuration of a weight to which a low-rank component is added."""
    added = ComponentConfig(LowRank.TYPE, {"rank": min(rank, *config.shape)})
    return replace(config, components=(*config.components, added))


def with_added(plan: Plan, ranks: Mapping[str, int]) -> Plan:
    """Return the plan with low-rank components of these ranks, by the name of the layer."""
    return plan.with_results(
        {
            name: replace(result, config=with_component(result.config, ranks[name]))
            for name, result in plan.results.items()
            if name in ranks
        }
    )


class AddedComponent(AdaptedMatrix):
    """The sum of a compressed weight, of which nothing changes, and a low-rank component."""

    module: CompressedLinear
    adapter: LowRankAdapter | None
    _stored: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the weight."""
        return self.module.config.shape

    @property
    def numbers(self) -> Tensor:
        """The weight."""
        return self.module.dense_weight()

    @property
    def rank(self) -> int:
        """Rank of the component."""
        assert self.adapter is not None
        return len(self.adapter.A)

    @property
    def like(self) -> str:
        """The name of the scales."""
        name = next(name for name, _ in self.module.named_parameters() if name.endswith("_scale"))
        return f".{name}"

    def attach(self, adapter: Adapter) -> None:
        """Add the product with the adapter to the output."""
        assert isinstance(adapter, LowRankAdapter)
        self.adapter = adapter

        def add(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            A, B = (adapter.A, adapter.size * adapter.B) if self._stored is None else self._stored
            return y + nn.functional.linear(nn.functional.linear(args[0], A), B)

        self.module.register_forward_hook(add)

    @contextmanager
    def as_stored(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute with the factors as they would be stored, inside the context."""
        assert self.adapter is not None
        A, B = self._factors(dtype)
        self._stored = A.to(self.adapter.A), B.to(self.adapter.B)
        try:
            yield
        finally:
            self._stored = None

    def merge_(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the factors of the component, which training continues to compute with."""
        A, B = self._factors(dtype)
        prefix = f".{LowRank.TYPE}"
        return {f"{prefix}.{leaf}": t for leaf, t in LowRank.encode(B=B, A=A).items()}

    @torch.no_grad()
    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factors [rank, d_in] and [d_out, rank]."""
        assert self.adapter is not None
        return self.adapter.A.to(dtype), (self.adapter.size * self.adapter.B).to(dtype)


def adding(
    root: nn.Module,
    matrices: Mapping[str, AdaptedMatrix],
    excluded: Iterable[nn.Module | None] = (),
) -> dict[str, AdaptedMatrix]:
    """Return matrices to adapt if integers keep their codes, by name.

    Weights with integers get a component; those that cannot have one are left out. Everything else
    is adapted as `matrices` says.
    """
    skipped = {id(module) for module in excluded}
    layers = {
        name: layer
        for name, layer in root.named_modules()
        if isinstance(layer, CompressedLinear) and not isinstance(layer, CompressedEmbedding)
    }
    owners = {layer.config.shares for layer in layers.values()}
    added = {
        name: AddedComponent(layer)
        for name, layer in layers.items()
        if takes_component(layer.config) and name not in owners and id(layer) not in skipped
    }
    kept = {
        name: matrix
        for name, matrix in matrices.items()
        if not isinstance(matrix, IntegerMatrix)
        and not any(name.startswith(f"{layer}.") for layer in added)
    }
    return {**kept, **added}
