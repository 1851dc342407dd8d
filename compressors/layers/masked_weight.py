"""Components that store values and a mask of their places, and multiply by them without zeros."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.kernels import FastPath, Need, needs_gradients, run_or_restore, select
from lrc.compressors.kernels.masked import EIGHT_OF, Masked, prepare
from lrc.compressors.layers.bitmask import scatter_values, unpack_bits
from lrc.compressors.layers.component import Component
from lrc.compressors.layers.placed_values import Places, placed, places_of
from lrc.compressors.layers.quantization_args import VALUES_GROUP
from lrc.compressors.layers.recomputed import product


class MaskedWeight(FastPath, Component):
    """A component with the tensors ``values`` and ``mask``.

    What a fast path derives from the mask is kept in buffers that are not part of the state dict,
    named after the fields of `Masked`.
    """

    _places: tuple[Tensor, int, Places] | None = None
    """The stored mask, its version, and the places of its bits, which training needs."""

    @abstractmethod
    def layout(self) -> tuple[int, int, int, int]:
        """Return the fields `layout`, `columns`, `n` and `group` of `Masked`."""

    def masked(self) -> Masked:
        """Return the stored tensors for the entry in use."""
        layout, columns, n, group = self.layout()
        args, buffers = self.config.quantization, self._buffers
        mask = buffers["mask"]
        assert mask is not None
        places: dict[str, Any] = {name: buffers[name] for name in self._derived}
        mask = places.pop("padded", mask)
        if args is None:
            values = self._parameters["values"]
            assert values is not None
            return Masked(layout, columns, values, mask, n=n, group=group, **places)
        packed = buffers["values_packed"]
        assert packed is not None
        scale = self._parameters["values_scale"]
        return Masked(
            layout, columns, packed, mask, scale, n=n, bits=args.bits, group=group, **places
        )

    def restore(self) -> None:
        """Return to the plain product; places are found anew."""
        self._places = None
        super().restore()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the stored tensors."""
        return {**super().__getstate__(), "_places": None}

    def at_places(self, values: Tensor, columns: int, size: int = 1) -> Tensor:
        """Return values where the mask is set, and zeros elsewhere.

        Parameters
        ----------
        values : Tensor
            Groups of `size` numbers, in the order of the bits that are set.
        columns : int
            Bits in a row of the mask.
        size : int
            Numbers that share a bit.

        Returns
        -------
        Tensor, shape [rows, columns * size]
        """
        stored = self.get_buffer("mask")
        if needs_gradients(values) and not torch.compiler.is_compiling():
            known, version = self._places, 0 if stored.is_inference() else stored._version
            if known is None or known[0] is not stored or known[1] != version:
                known = self._places = stored, version, places_of(unpack_bits(stored, columns))
            return placed(values, known[2])
        return scatter_values(values, stored, columns, size)

    def fast_arguments(self) -> tuple[Tensor, tuple[Any, ...]]:
        """Return values or scales, and the arguments of the entry in use besides the input."""
        return self._numbers(), (self.masked(),)

    def _numbers(self) -> Tensor:
        like = self._parameters["values" if self.config.quantization is None else "values_scale"]
        assert like is not None
        return like

    def masked_product(self, x: Tensor) -> Tensor | None:
        """Map ``x`` [..., columns] to [..., d_out] with the fast path, or return None."""
        like = self._numbers()
        if x.shape[-1] != self.layout()[1] or not self.is_fast(x, like):
            return None
        y: Tensor | None = run_or_restore(self, x.reshape(-1, x.shape[-1]), self.masked())
        return None if y is None else y.view(*x.shape[:-1], self.d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y = None if self.siblings is None else self.siblings.multiply(self.position, x)
        y = self.masked_product(x) if y is None else y
        return product(x, self.matrix, self) if y is None else y

    def _select(self) -> str | None:
        args, mask = self.config.quantization, self._buffers.get("mask")
        if mask is None:
            return "positions are stored as indices"
        like = self.get_parameter("values" if args is None else "values_scale")
        if like.is_meta or mask.is_meta:
            return "the weights are offloaded"
        layout, columns, n, group = self.layout()
        need = Need(
            "masked_linear",
            "float" if args is None else args.bits,
            mask.device,
            like.dtype,
            (self.d_out, columns),
            None if args is None else group,
        )
        entry = select(need)
        if isinstance(entry, str):
            return entry
        if entry.places is not None and (layout != EIGHT_OF or entry.device == "cpu"):
            self._derive(**entry.places.find(mask, columns))
        if entry.device == "cuda":
            prepare(mask.device, n)
        self.entry = entry
        return None

    def values_group(self) -> int:
        """Return the number of consecutive values with a common scale; 1 without scales."""
        args = self.config.quantization
        return 1 if args is None else args.group_size or VALUES_GROUP
