"""Training of the integer factors of an elastic checkpoint as numbers.

What larger budgets add to the smallest one is stored as 8-bit integers. If these were fixed, a
change of the numbers that all budgets share, made for the smallest one, would harm the larger ones,
which could not undo it. So the factors are trained as numbers, and rounded when they are measured
and stored; eight bits are precise enough for that.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.heal.stored import StoredModel
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import repack_integers

SCALE = ".weight_scale"
LARGEST = 127
"""The largest code of a row, which determines its scale."""


class UnpackedFactor:
    """A factor of integers that a component multiplies by as numbers in float32.

    Parameters
    ----------
    component : LowRank
        Its child is replaced.
    name : str
        Name of the child, ``a`` or ``b``.
    dtype : torch.dtype
        Of the stored scales.
    """

    moves = False
    """Whether values change their places."""

    def __init__(self, component: LowRank, name: str, dtype: torch.dtype) -> None:
        packed: Any = component.get_submodule(name)
        weight = packed.weight.detach().float()
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        component.add_module(name, linear)
        self.numbers, self._dtype = linear.weight, dtype

    def select_(self) -> None:
        """Select nothing: all numbers are used."""

    def selected(self) -> Tensor:
        """Return the numbers [rows, columns] as they would be stored, in float32."""
        codes, scale = self._rounded(self.numbers.detach())
        return codes * scale.float()

    def encode(self, selected: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of what `selected` returned, by the ends of their names."""
        codes, scale = self._rounded(selected)
        return {"_packed": repack_integers(codes.to(torch.int8), 8), "_scale": scale}

    def _rounded(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [rows, columns] and scales [rows, 1]; rounding twice changes nothing."""
        largest = numbers.abs().amax(dim=1, keepdim=True)
        scale = (torch.where(largest > 0, largest, 1) / LARGEST).to(self._dtype)
        return (numbers / scale.float()).round().clamp(-LARGEST, LARGEST), scale


def unpack_factors_(
    root: nn.Module, selected: dict[str, Any], stored: StoredModel
) -> dict[str, UnpackedFactor]:
    """Train the integers of elastic components whose scales are selected; return them by name.

    In `selected`, whose names are those in `root`, the scales are replaced by the numbers.
    """
    found = {}
    for name in [each for each in selected if each.endswith(SCALE)]:
        path = name.removesuffix(SCALE)
        owner, _, leaf = path.rpartition(".")
        component = root.get_submodule(owner)
        if not isinstance(component, LowRank) or not component.config.ranks:
            continue
        assert isinstance(component.get_submodule(leaf), PackedLinear)
        (dtype,) = stored.dtypes([name]).values()
        factor = found[f"{path}.weight"] = UnpackedFactor(component, leaf, dtype)
        del selected[name]
        selected[f"{path}.weight"] = factor.numbers
    return found
