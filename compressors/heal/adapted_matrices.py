"""Stored matrices to which an adapter is added, and which absorb it.

A 16-bit matrix takes the sum. That includes the factors of a low-rank component, each of which has
an adapter: their product has the same rank as before, while that of the sum ``B A + delta`` would
have to be truncated again. With masks the difference is masked, too (MaskLoRA [1]_). Integers are
rounded in every step, see `adapted_integers`. So training computes with what is stored, up to
rounding to 16 bits.

References
----------
.. [1] M. Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023.
   https://arxiv.org/abs/2312.15230
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.heal.adapters import Adapter
from lrc.compressors.layers.bitmask import unpack_bits
from lrc.compressors.layers.masked_weight import MaskedWeight


class AdaptedMatrix(ABC):
    """A matrix of a module that can be given one adapter.

    Parameters
    ----------
    module : nn.Module
        A module whose `forward` multiplies by the matrix.
    """

    adapter: Adapter | None = None

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the matrix."""

    @property
    @abstractmethod
    def numbers(self) -> Tensor:
        """The numbers of the matrix, without those that a mask sets to zero."""

    @property
    def size(self) -> float:
        """Root mean square of the matrix."""
        return float(self.numbers.detach().float().square().mean().sqrt())

    @property
    def like(self) -> str:
        """What follows the name of the matrix in that of a tensor stored in the same dtype."""
        return ""

    @abstractmethod
    def attach(self, adapter: Adapter) -> None:
        """Add an adapter to the matrix in all calls of the module from now on."""

    @abstractmethod
    def as_stored(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Compute as if the adapter were stored in `dtype`, inside the context."""

    @abstractmethod
    def merge_(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Store the adapter; return the tensors by what follows the name of the matrix."""


class AbsorbingMatrix(AdaptedMatrix):
    """A matrix whose stored form can represent the sum with an adapter."""

    LEAF: str
    """Name of the stored tensor within the module."""

    @abstractmethod
    def detach(self) -> None:
        """Remove the adapter."""

    @abstractmethod
    def merged(self) -> Tensor:
        """Return the stored tensor with the adapter in it, in the dtype of the module."""

    @contextmanager
    def as_stored(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute with the sum as it would be stored, inside the context."""
        adapter = self.adapter
        assert adapter is not None
        before = getattr(self.module, self.LEAF).detach().clone()
        self.merge_(dtype)
        try:
            yield
        finally:
            self._replace_(before)
            self.attach(adapter)

    def merge_(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Replace the stored tensor by the sum, and return it."""
        merged = self.merged().to(dtype)
        self.detach()
        self._replace_(merged)
        return {"": merged}

    @torch.no_grad()
    def _replace_(self, tensor: Tensor) -> None:
        getattr(self.module, self.LEAF).copy_(tensor)


class FloatMatrix(AbsorbingMatrix):
    """The weight of a linear layer: of a dense one, or a factor of a component."""

    LEAF = "weight"
    module: nn.Linear

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the matrix."""
        return self.module.out_features, self.module.in_features

    @property
    def numbers(self) -> Tensor:
        """The matrix."""
        return self.module.weight

    def attach(self, adapter: Adapter) -> None:
        """Add the product with the adapter to the output."""
        self.adapter = adapter
        self._hook = self.module.register_forward_hook(lambda _, args, y: adapter(args[0], y))

    def detach(self) -> None:
        """Remove the adapter."""
        self.adapter = None
        self._hook.remove()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the sum of matrix and adapter."""
        assert self.adapter is not None
        return self.module.weight + self.adapter.delta()


class MaskedValues(AbsorbingMatrix):
    """The values of a mask, or the coefficients of a dictionary."""

    LEAF = "values"
    module: MaskedWeight

    def __init__(self, module: MaskedWeight) -> None:
        super().__init__(module)
        self._places: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix with its zeros."""
        return self.module.d_out, self.module.layout()[1]

    @property
    def numbers(self) -> Tensor:
        """The values."""
        return self.module.get_parameter("values")

    @property
    def places(self) -> Tensor:
        """Places of the values in the flattened matrix, in the order of the values.

        Always the same tensor: a recorded step has its address, also after a measurement in which
        the adapter was detached.
        """
        if self._places is None:
            self._places = self._find_places()
        return self._places

    def _find_places(self) -> Tensor:
        buffers, (rows, columns) = dict(self.module.named_buffers()), self.shape
        if "mask" in buffers:
            return unpack_bits(buffers["mask"], columns).flatten().nonzero().flatten()
        first = torch.arange(rows, device=buffers["index"].device) * columns
        return (first[:, None] + buffers["index"].long()).flatten()

    def attach(self, adapter: Adapter) -> None:
        """Add the adapter at the places of the mask."""
        self.adapter, places = adapter, self.places
        parameters: dict[str, Any] = self.module._parameters
        values = parameters["values"]

        def add(*_: Any) -> None:
            changes = adapter.delta().flatten().index_select(0, places)
            parameters["values"] = values + changes.view_as(values)

        def remove(*_: Any) -> None:
            parameters["values"] = values

        # Also if the call ends early, as it does where checkpointing computes it again.
        self._hooks = [
            self.module.register_forward_pre_hook(add),
            self.module.register_forward_hook(remove, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the adapter."""
        self.adapter = None
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the values with the differences at their places."""
        assert self.adapter is not None
        values = self.numbers
        return values + self.adapter.delta().flatten()[self.places].view_as(values)
