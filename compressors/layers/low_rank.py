"""A matrix as the product of two thin ones."""

from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.component import ComponentConfig, SharedFactorComponent, multiply
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs
from lrc.compressors.layers.tiles import exceeds, in_tiles


class LowRank(SharedFactorComponent):
    """The product ``B @ A``, multiplied one factor after the other.

    The layers of a group can share ``A`` [1]_. In an elastic checkpoint columns of ``B`` and rows
    of ``A`` are ordered by what they contribute: the first ones alone are a good product of a
    lower rank.

    References
    ----------
    .. [1] J. Wang et al., "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model
       Compression", ICLR 2025. https://arxiv.org/abs/2410.03765
    """

    TYPE = "low_rank"
    SIZES = ("rank",)
    SHARED_SIZE = "rank"

    used_rank: int | None = None
    """Rank that products use, to train for several budgets; None for all of it."""

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

    @classmethod
    def describe(cls, d_out: int, d_in: int, config: ComponentConfig) -> str:
        """Return the rank and, if there are several budgets, the lowest one."""
        rank = super().describe(d_out, d_in, config)
        return f"{rank} to {config.ranks[-1]}" if config.ranks else rank

    @staticmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the factors ``B`` [d_out, rank] and ``A`` [rank, d_in] as they are."""
        return {"a.weight": A, "b.weight": B}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        if self.used_rank is not None:
            return self._cut_product(x, self.used_rank)
        if self.tile is not None and exceeds(x, self.tile):
            return in_tiles(self._of_tile, x, self.tile)
        return multiply(self.get_submodule("b"), self.multiply_first(x))

    def _of_tile(self, x: Tensor) -> Tensor:
        return multiply(self.get_submodule("b"), self.multiply_first_alone(x))

    def _cut_product(self, x: Tensor, rank: int) -> Tensor:
        a, b = (self.get_submodule(name).get_parameter("weight") for name in ("a", "b"))
        return nn.functional.linear(nn.functional.linear(x, a[:rank]), b[:, :rank])

    def cut_(self, index: int) -> None:
        """Cut the factors to one of the budgets, which are counted from 0, and free the rest."""
        self.config = self.config.at_budget(index)
        rank = self.config.sizes["rank"]
        for name in ("a", "b"):
            linear: Any = self.get_submodule(name)
            weight = cut_factor(name, linear.weight.detach(), rank)
            linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
            linear.out_features, linear.in_features = weight.shape

    def matrix(self) -> Tensor:
        """Return ``B @ A`` [d_out, d_in] in float32."""
        b: Any = self.get_submodule("b")
        B: Tensor = b.weight.float()
        return B @ self.first_matrix(B)


def cut_factor(name: str, factor: Tensor, rank: int) -> Tensor:
    """Return a copy of the first rows of the factor ``a``, or of the first columns of ``b``."""
    return (factor[:rank] if name == "a" else factor[:, :rank]).clone(
        memory_format=torch.contiguous_format
    )
