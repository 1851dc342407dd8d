"""Products that layers with the same input compute together, when the first of them is called."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Held = tuple[Tensor, int, Sequence[Tensor], tuple[int, ...]]
"""Input, its version, the products, and the positions of the layers that have not taken theirs."""


class SharedInput(ABC):
    """The products of one input with the matrices of several layers, such as q, k and v.

    The layer that is called first computes all of them, the others take theirs. The layers multiply
    separately where gradients are recorded, and where a subclass cannot compute the products.

    That the layers receive the same input is an assumption. If a layer is called with another
    tensor before all of them have been called once with the same one, the group is dissolved.

    Parameters
    ----------
    members : sequence of nn.Module
        Components, in any order.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = tuple(members)
        count = len(self.members)
        self._rest = tuple(tuple(j for j in range(count) if j != i) for i in range(count))
        self._held: Held | None = None
        self._confirmed = False
        self._dissolved = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and files keep."""
        return vars(self) | {"_held": None}

    def multiply(self, position: int, x: Tensor) -> Tensor | None:
        """Return the product of ``x`` [..., d_in] and the matrix of one member, or None.

        None says that the member must multiply by itself.
        """
        held, self._held = self._held, None
        recording = torch.is_grad_enabled()
        if held is not None:
            source, version, products, waiting = held
            if source is x and position in waiting and version == _version(x):
                return None if recording else self._take(position, x, products, waiting)
            if not self._confirmed:
                self.dissolve()
        if self._dissolved or recording:
            return None
        found = self._products(x)
        if found is None:
            return None
        return self._take(position, x, found, (position, *self._rest[position]))

    @abstractmethod
    def _products(self, x: Tensor) -> Sequence[Tensor] | None:
        """Return the products of all members; None if they must multiply separately."""

    def follow(self) -> None:
        """Forget what belongs to members as they were before a move or a conversion."""
        self._held = None

    def dissolve(self) -> None:
        """Let every layer multiply by itself from now on."""
        self._dissolved = True

    def _take(
        self, position: int, x: Tensor, products: Sequence[Tensor], waiting: tuple[int, ...]
    ) -> Tensor:
        waiting = tuple([other for other in waiting if other != position])
        if waiting:
            self._held = (x, _version(x), products, waiting)
        elif not torch.compiler.is_compiling() and not self._confirmed:
            self._confirmed = True  # a compiled graph would have to be compiled again
        return products[position]


def _version(x: Tensor) -> int:
    """Return a number that changes when a tensor is modified, where there is one."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
