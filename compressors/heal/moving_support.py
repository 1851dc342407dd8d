"""Training of the places of stored values, together with the values.

All entries of a matrix are trained, and the largest of them are used: always as many as are stored.
The gradient is passed straight through the selection [1]_, so that entries which are not used can
become large enough to replace others. DSFormer trains the sparse factor of dictionaries in this way
[2]_; here it starts from the values that earlier stages have found, with zeros elsewhere.

References
----------
.. [1] A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
   ICLR 2021. https://arxiv.org/abs/2102.04010
.. [2] R. Chand et al., "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight
   Factorization", 2023. https://arxiv.org/abs/2312.13211
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.masked_entries import MaskedEntries

VALUES = "values"


class SelectLargest(torch.autograd.Function):
    """Set the entries outside a mask to zero; the gradient is that of the result."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, mask: Tensor) -> Tensor:
        """Return the entries [d_out, columns] inside the mask."""
        return entries.where(mask, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for all entries."""
        return gradient, None


class MovingSupport:
    """A component whose values may change their places until `restore_` is called.

    The parameter ``values`` of the component is replaced by one with all entries of the matrix. The
    selection stays as it is until `select_` is called, and its mask is then changed in place: a
    recorded step reads it.
    """

    moves = True
    """Whether values change their places."""

    def __init__(self, component: MaskedEntries) -> None:
        self._component, self._stored = component, component.get_parameter(VALUES)
        self.entries = nn.Parameter(
            component.entries().detach().float().clone(), requires_grad=False
        )
        self.mask = component.largest(self.entries)
        """The places of the largest entries [d_out, columns]."""
        component.register_parameter(VALUES, self.entries)
        component.forward = self._forward  # type: ignore[method-assign]

    def restore_(self) -> None:
        """Give the component its stored values and its product back."""
        del self._component.forward
        self._component.register_parameter(VALUES, self._stored)

    @torch.no_grad()
    def select_(self) -> None:
        """Select the entries that are the largest now."""
        self.mask.copy_(self._component.largest(self.entries))

    def selected(self) -> Tensor:
        """Return the largest entries, and zeros elsewhere."""
        return self.entries.detach().where(self.mask, 0)

    def encode(self, selected: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of what `selected` returned, in its dtype."""
        return self._component.encode_entries(selected, self._component.largest(selected))

    def _forward(self, x: Tensor) -> Tensor:
        select: Any = SelectLargest.apply
        return self._component.multiply_entries(x, select(self.entries, self.mask))


def move_supports_(root: nn.Module, parameters: dict[str, Any]) -> dict[str, MovingSupport]:
    """Let the values among `parameters` change their places; return their supports by name.

    In `parameters`, whose names are those in `root`, values are replaced by all entries. Quantized
    values keep their places.
    """
    supports = {}
    for name in parameters:
        prefix, _, leaf = name.rpartition(".")
        component = root.get_submodule(prefix)
        if leaf == VALUES and isinstance(component, MaskedEntries):
            supports[name] = MovingSupport(component)
            parameters[name] = supports[name].entries
    return supports
