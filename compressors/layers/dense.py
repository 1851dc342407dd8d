"""A whole matrix; useful as a component when it is quantized."""

from torch import Tensor, nn

from lrc.compressors.layers.component import Component, ComponentConfig
from lrc.compressors.layers.packed_weight import PackedWeight
from lrc.compressors.layers.quantization_args import QuantizationArgs, TensorSpec, TensorSpecs


class Dense(PackedWeight, Component):
    """A matrix [d_out, d_in] whose entries are all stored, as integers and scales.

    Without a fast path it is dequantized for every call, which saves memory, not arithmetic.
    """

    TYPE = "dense"
    multiplies = True
    """False if the matrix is only used to look up rows, so that no fast path is needed."""

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return the specification of the matrix."""
        return {"weight": TensorSpec([d_out, d_in], role="matrix")}

    @staticmethod
    def encode(W: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the matrix as it is."""
        return {"weight": W}

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.d_out, self.d_in

    @property
    def packed_args(self) -> QuantizationArgs | None:
        """Quantization of the matrix; None if it is not quantized."""
        return self.config.quantization

    def _select(self) -> str | None:
        return super()._select() if self.multiplies else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]; integer ids [...] to rows [..., d_in]."""
        if self.config.quantization is None:
            weight = self.get_parameter("weight")
            product = nn.functional.linear if x.is_floating_point() else nn.functional.embedding
            return product(x, weight)
        if x.is_floating_point():
            y = None if self.siblings is None else self.siblings.multiply(self.position, x)
            return self.packed_product(x) if y is None else y
        return self.packed_rows(x.flatten()).view(*x.shape, self.d_in)

    def matrix(self) -> Tensor:
        """Return the dequantized matrix [d_out, d_in]."""
        if self.config.quantization is None:
            return self.get_parameter("weight")
        return self.packed_matrix()
