"""A whole matrix; useful as a component when it is quantized."""

from torch import Tensor, nn

from lrc.compressors.layers.component import Component, ComponentConfig
from lrc.compressors.layers.packing import dequantize, read_matrix, unpack_integers
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs


class Dense(Component):
    """A matrix [d_out, d_in] whose entries are all stored, as integers and scales.

    The matrix is dequantized for every call: this saves memory, not arithmetic.
    """

    TYPE = "dense"

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return the specification of the matrix."""
        return {"weight": TensorSpec([d_out, d_in], role="matrix")}

    @staticmethod
    def encode(W: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the matrix as it is."""
        return {"weight": W}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]; integer ids [...] to rows [..., d_in]."""
        if not x.is_floating_point():
            return self._rows(x)
        return nn.functional.linear(x, self.matrix())

    def _rows(self, ids: Tensor) -> Tensor:
        """Return the rows of an embedding; only these are dequantized."""
        args = self.config.quantization
        if args is None:
            return nn.functional.embedding(ids, self.get_parameter("weight"))
        flat = ids.flatten()
        packed = self.get_buffer("weight_packed").index_select(0, flat)  # refuses negative ids
        codes = unpack_integers(packed, args.bits, self.d_in)  # [n, d_in]
        zero = None
        if not args.symmetric:  # packed along the rows
            columns = self.get_buffer("weight_zero_point").T
            zero = unpack_integers(columns, args.bits, self.d_out).T[flat]
        scale = self.get_parameter("weight_scale")[flat]
        return dequantize(codes, scale, zero).view(*ids.shape, self.d_in)

    def matrix(self) -> Tensor:
        """Return the dequantized matrix [d_out, d_in]."""
        if self.config.quantization is None:
            return self.get_parameter("weight")
        return read_matrix(self, self.d_out, self.d_in, self.config.quantization)
