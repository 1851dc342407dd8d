"""Which matrices can be adapted, and what each value of `train` gives them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lrc.compressors.heal.adapted_integers import IntegerMatrix
from lrc.compressors.heal.adapted_matrices import (
    AbsorbingMatrix,
    AdaptedMatrix,
    FloatMatrix,
    MaskedValues,
)
from lrc.compressors.heal.adapters import Adapter, KroneckerAdapter, LowRankAdapter
from lrc.compressors.heal.trained_slices import sliced_matrices
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.masked_weight import MaskedWeight
from lrc.compressors.layers.packed_weight import PackedLinear

KINDS: dict[type[nn.Module], Callable[[Any], AbsorbingMatrix]] = {
    nn.Linear: FloatMatrix,
    PackedLinear: IntegerMatrix,
    Dense: IntegerMatrix,
    MaskedWeight: MaskedValues,
}


def adaptable(
    root: nn.Module, excluded: Iterable[nn.Module | None] = ()
) -> dict[str, AdaptedMatrix]:
    """Return the matrices of a model or a decoder layer by the names of their stored tensors.

    Quantized values of masks are left out.
    """
    skipped = {id(m) for module in excluded if module is not None for m in module.modules()}
    found: dict[str, AdaptedMatrix] = {}
    for name, module in root.named_modules():
        kind = next((make for type_, make in KINDS.items() if isinstance(module, type_)), None)
        if kind is None or id(module) in skipped:
            continue
        if isinstance(module, MaskedWeight) and module.config.quantization is not None:
            continue
        matrix = kind(module)
        found[f"{name}.{matrix.LEAF}"] = matrix
    return found


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
            shared[key] = KroneckerAdapter.new_terms(n, generator, matrix.numbers.device)
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
