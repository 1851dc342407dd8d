"""A matrix as the product of two thin ones."""

from typing import Any

from torch import Tensor

from lrc.compressors.layers.component import ComponentConfig, SharedFactorComponent
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs
from lrc.compressors.layers.tiles import exceeds, in_tiles


class LowRank(SharedFactorComponent):
    """The product ``B @ A``, multiplied one factor after the other.

    The layers of a group can share ``A`` [1]_.

    References
    ----------
    .. [1] J. Wang et al., "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model
       Compression", ICLR 2025. https://arxiv.org/abs/2410.03765
    """

    TYPE = "low_rank"
    SIZES = ("rank",)
    SHARED_SIZE = "rank"

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return ``a.weight`` [rank, d_in], unless shared, and ``b.weight`` [d_out, rank]."""
        rank = config.sizes["rank"]
        specs = {"b.weight": TensorSpec([d_out, rank], role="matrix")}
        if config.shares is None:
            specs["a.weight"] = TensorSpec([rank, d_in], role="matrix")
        return specs

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, config: ComponentConfig) -> int:
        """Return those of the two products."""
        return config.sizes["rank"] * (d_out + d_in)

    @staticmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the factors ``B`` [d_out, rank] and ``A`` [rank, d_in] as they are."""
        return {"a.weight": A, "b.weight": B}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        if self.tile is not None and exceeds(x, self.tile):
            return in_tiles(self._of_tile, x, self.tile)
        y: Tensor = self.get_submodule("b")(self.multiply_first(x))
        return y

    def _of_tile(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule("b")(self.multiply_first_alone(x))
        return y

    def matrix(self) -> Tensor:
        """Return ``B @ A`` [d_out, d_in] in float32."""
        b: Any = self.get_submodule("b")
        B: Tensor = b.weight.float()
        return B @ self.first_matrix(B)
