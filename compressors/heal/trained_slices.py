"""Channels of MLPs and attention heads that are trained while the others are frozen (S2FT).

A channel is a row of the matrices that compute it and a column of the one that reads it. A head is
a key-value head: its rows of the value projection, and the columns of the output projection for all
query heads that read it. Training a few of them in all of these matrices is training a slice of
each, with dense products [1]_.

References
----------
.. [1] X. Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured
   Sparsity", NeurIPS 2024. https://arxiv.org/abs/2412.06289
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.heal.adapted_matrices import AdaptedMatrix
from lrc.compressors.heal.adapters import Adapter, SliceAdapter
from lrc.compressors.slicing.layout import ATTENTIONS, MLPS

Maker = tuple[AdaptedMatrix, Callable[[torch.Generator], Adapter]]


@dataclass(frozen=True)
class Coupled:
    """Linear layers that share units, which are channels or heads; by full names."""

    rows: tuple[str, ...]
    """Layers of which every unit has the same number of consecutive rows."""
    columns: str
    """The layer of which every unit has the same number of consecutive columns."""
    n_units: int


def coupled_layers(root: nn.Module) -> Iterator[Coupled]:
    """Yield the MLPs and the attention modules whose layers have the usual names."""
    for path, module in root.named_modules():
        children, prefix = dict(module.named_children()), f"{path}." if path else ""
        for *inputs, last in MLPS:
            if {*inputs, last} <= children.keys():
                width: Any = children[last].in_features
                yield Coupled(tuple(prefix + name for name in inputs), prefix + last, width)
        for *_, value, last in ATTENTIONS:
            head_dim = getattr(module, "head_dim", None)
            if {value, last} <= children.keys() and head_dim is not None:
                n_heads: Any = children[value].out_features // head_dim
                yield Coupled((prefix + value,), prefix + last, n_heads)


class Choice:
    """The units of coupled layers that are trained, drawn when they are needed first.

    Parameters
    ----------
    n_units, n_chosen : int
    matrices : list of tuple of AdaptedMatrix and int
        Those that are trained, with the dimension along which units follow each other.
    by_norm : bool
        Whether the units with the largest norm are chosen, instead of random ones.
    """

    def __init__(
        self,
        n_units: int,
        n_chosen: int,
        matrices: list[tuple[AdaptedMatrix, int]],
        *,
        by_norm: bool,
    ) -> None:
        self._n_units, self._n_chosen = n_units, n_chosen
        self._matrices, self._by_norm = matrices, by_norm
        self._units: Tensor | None = None

    def units(self, generator: torch.Generator) -> Tensor:
        """Return the chosen units [n_chosen], ascending."""
        if self._units is None:
            order = torch.randperm(self._n_units, generator=generator)
            if self._by_norm:
                order = self._squares().argsort(descending=True, stable=True).cpu()
            self._units = order[: self._n_chosen].sort().values
        return self._units

    def places(self, width: int, generator: torch.Generator) -> Tensor:
        """Return the rows or columns of the chosen units in a matrix that has `width` of them."""
        each = width // self._n_units
        return (self.units(generator)[:, None] * each + torch.arange(each)).flatten()

    @torch.no_grad()
    def _squares(self) -> Tensor:
        """Return the squared norm of every unit, relative to that of each matrix."""
        found = []
        for matrix, dim in self._matrices:
            squares = matrix.numbers.float().square().sum(1 - dim)
            found.append(squares.view(self._n_units, -1).sum(1) / squares.sum().clamp_min(1e-30))
        return torch.stack(found).sum(0)


def sliced_matrices(
    root: nn.Module, matrices: Mapping[str, AdaptedMatrix], options: Any
) -> dict[str, Maker]:
    """Return the dense 16-bit matrices with units of which a fraction is trained, by name."""
    found: dict[str, Maker] = {}
    for coupled in coupled_layers(root):
        named = [(f"{name}.weight", 0) for name in coupled.rows] + [
            (f"{coupled.columns}.weight", 1)
        ]
        present = {name: (matrices[name], dim) for name, dim in named if name in matrices}
        n_chosen = round(options.fraction * coupled.n_units)
        usual = all(each.shape[dim] % coupled.n_units == 0 for each, dim in present.values())
        if n_chosen == 0 or not usual:
            continue
        choice = Choice(
            coupled.n_units, n_chosen, [*present.values()], by_norm=options.choose == "norm"
        )
        for name, (matrix, dim) in present.items():
            found[name] = matrix, partial(_adapter, matrix, dim, choice)
    return found


def _adapter(
    matrix: AdaptedMatrix, dim: int, choice: Choice, generator: torch.Generator
) -> SliceAdapter:
    places = choice.places(matrix.shape[dim], generator)
    return SliceAdapter(matrix.shape, dim=dim, places=places, size=matrix.size)
