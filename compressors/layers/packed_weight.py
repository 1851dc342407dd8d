"""A module that stores a quantized matrix, and a linear layer with such a weight."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.kernels import FastPath, Need, run_or_restore, select
from lrc.compressors.kernels.implementations import Layout
from lrc.compressors.layers.packing import dequantize, repack_integers, unpack_integers
from lrc.compressors.layers.quantization_args import QuantizationArgs
from lrc.compressors.layers.recomputed import product

CONVERTED = "converted_"
"""Prefix of the buffers of a converted copy; they are not part of the state dict."""
PART = 1 << 19
"""Codes that are converted at a time: temporary tensors are small next to a large matrix."""


class PackedWeight(FastPath):
    """A module whose matrix may be stored as packed integers, under the name ``weight``.

    Some fast paths need the codes in another order. The converted copy then takes the place of the
    stored buffers, and every way to read or write these converts back: state dicts are the same as
    without a fast path.
    """

    _copy: dict[str, Tensor] | None = None
    """The converted copy; its tensors are buffers, too, so that they count as memory."""
    _scale_state: tuple[int, int] | None = None

    @property
    @abstractmethod
    def packed_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @property
    @abstractmethod
    def packed_args(self) -> QuantizationArgs | None:
        """Quantization of the matrix; None if it is not quantized."""

    def codes(self, ids: Tensor | None = None) -> Tensor:
        """Return the int8 codes [rows, columns], or those of the rows `ids` [n]."""
        args, (_, columns) = self._args(), self.packed_shape
        if self._copy is not None:
            assert self.entry is not None
            assert self.entry.layout is not None
            rows = None if ids is None else ids.cpu()
            found = self.entry.layout.unpack(self._copy, args.bits, self.packed_shape, rows)
            # Hooks of device maps move parameters and buffers, but not the copy.
            return found.to(self.get_parameter("weight_scale").device)
        packed = self.get_buffer("weight_packed")
        if ids is not None:
            packed = packed.index_select(0, ids)
        return unpack_integers(packed, args.bits, columns)

    def zero_points(self) -> Tensor | None:
        """Return the codes that represent 0 [rows, groups], int8; None if symmetric."""
        args = self._args()
        if args.symmetric:
            return None
        packed = self.get_buffer("weight_zero_point").T
        return unpack_integers(packed, args.bits, self.packed_shape[0]).T

    def packed_matrix(self) -> Tensor:
        """Return the matrix [rows, columns], in the dtype of the scales."""
        return dequantize(self.codes(), self.get_parameter("weight_scale"), self.zero_points())

    def packed_rows(self, ids: Tensor) -> Tensor:
        """Return the rows `ids` [n] of the matrix as [n, columns]."""
        zero = self.zero_points()
        scale = self.get_parameter("weight_scale").index_select(0, ids)  # refuses negative ids
        return dequantize(self.codes(ids), scale, None if zero is None else zero[ids])

    def packed_product(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., columns] to [..., rows]."""
        scale = self._parameters["weight_scale"]  # `get_parameter` takes as long as a product
        assert scale is not None
        rows, columns = self.packed_shape
        if x.shape[-1] != columns or not self.is_fast(x, scale):
            return product(x, self.packed_matrix, self)
        # Converted scales are copies. Guards of compiled code do not see versions of tensors.
        converted = self._copy is not None and not torch.compiler.is_compiling()
        if converted and self._scale_state != state_of(scale):
            self.optimize()
        flat = x if x.dim() == 2 else x.reshape(-1, columns)
        y: Tensor | None = run_or_restore(self, flat, *self.fast_arguments()[1])
        if y is None:
            return nn.functional.linear(x, self.packed_matrix())
        return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)

    def fast_arguments(self) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the scales, and the arguments of the entry in use besides the input."""
        scale, bits = self._parameters["weight_scale"], self._args().bits
        assert scale is not None
        if self._copy is not None:
            return scale, (self._copy, bits, self.packed_shape[0])
        packed, zero = self._buffers["weight_packed"], self._buffers.get("weight_zero_point")
        return scale, (packed, scale, zero, bits)

    def _select(self) -> str | None:
        if self.packed_args is None:
            return None  # a dense product is as fast as it gets
        scale, packed = self.get_parameter("weight_scale"), self.get_buffer("weight_packed")
        args, shape = self._args(), self.packed_shape
        if scale.is_meta or packed.is_meta:
            return "the weights are offloaded"
        size = args.group_size
        need = Need(
            "packed_linear", args.bits, packed.device, scale.dtype, shape, size, args.symmetric
        )
        found = select(need)
        if isinstance(found, str):
            return found
        if found.layout is not None:
            with torch.no_grad():
                converted = found.layout.pack(
                    self._codes_by_parts(), scale, self.zero_points(), args.bits
                )
                # The stored words are released, so that they must be recovered bit by bit.
                if not self._is_reversible(found.layout, converted):
                    return f"{found.name}: the conversion is not reversible here"
            self._derive(**{CONVERTED + key: tensor for key, tensor in converted.items()})
            del self._buffers["weight_packed"]
            self._copy, self._scale_state = converted, state_of(scale)
        self.entry = found
        return None

    def restore(self) -> None:
        """Return to the plain product and to the stored tensors."""
        if self._copy is not None:
            self.register_buffer("weight_packed", self._repacked())
            self._copy = self._scale_state = None
        super().restore()

    def _args(self) -> QuantizationArgs:
        args = self.packed_args
        assert args is not None
        return args

    def _codes_by_parts(self) -> Tensor:
        """Return the stored codes [rows, columns]; unpacking needs several times as much memory."""
        packed, bits, (rows, columns) = self.get_buffer("weight_packed"), *self._coded()
        codes = packed.new_empty(rows, columns, dtype=torch.int8)
        for part in _parts(rows, columns):
            codes[part] = unpack_integers(packed[part], bits, columns)
        return codes

    def _is_reversible(self, layout: Layout, converted: dict[str, Tensor]) -> bool:
        """Return whether the stored words can be recovered from a converted copy."""
        packed, bits, (rows, columns) = self.get_buffer("weight_packed"), *self._coded()
        for part in _parts(rows, columns):
            ids = torch.arange(rows)[part]
            codes = layout.unpack(converted, bits, (rows, columns), ids)
            if not torch.equal(repack_integers(codes, bits), packed[part]):
                return False
        return True

    def _coded(self) -> tuple[int, tuple[int, int]]:
        return self._args().bits, self.packed_shape

    def _repacked(self) -> Tensor:
        return repack_integers(self.codes(), self._args().bits)

    # What reads or writes the stored tensors as they are.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._copy is not None:
            destination[f"{prefix}weight_packed"] = self._repacked()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the stored tensors."""
        state = super().__getstate__()
        if self._copy is not None:
            state["_buffers"]["weight_packed"] = self._repacked()
            state["_copy"] = state["_scale_state"] = None
        return state


def _parts(rows: int, columns: int) -> list[slice]:
    """Return slices of rows with about `PART` numbers each."""
    step = max(1, PART // columns)
    return [slice(n, n + step) for n in range(0, rows, step)]


def state_of(scale: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is replaced or written to."""
    return scale.data_ptr(), 0 if scale.is_inference() else scale._version


class PackedLinear(PackedWeight):
    """Compute ``y = x @ W.T`` from a quantized matrix under the tensor names of a linear layer.

    Scales are parameters, which training can tune; packed codes are buffers.

    Parameters
    ----------
    in_features, out_features : int
    args : QuantizationArgs
    device, dtype : optional
        Of the scales. All tensors are uninitialized.

    Raises
    ------
    ValueError
        If the group size does not divide the rows.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        args: QuantizationArgs,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.args = in_features, out_features, args
        for name, spec in args.matrix_specs("weight", [out_features, in_features]).items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
            if spec.dtype is None:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.out_features, self.in_features

    @property
    def packed_args(self) -> QuantizationArgs:
        """Quantization of the matrix."""
        return self.args

    @property
    def weight(self) -> Tensor:
        """The matrix [out_features, in_features], in the dtype of the scales."""
        return self.packed_matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in_features] to [..., out_features]."""
        return self.packed_product(x)

    def extra_repr(self) -> str:
        """Return shape and quantization for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.args}"
