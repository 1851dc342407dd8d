"""A matrix as the product of two thin ones."""

from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.assembled import is_assembled
from lrc.compressors.layers.component import ComponentConfig, SharedFactorComponent, multiply
from lrc.compressors.layers.packing import repack_integers, unpack_integers
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
        if torch.is_grad_enabled() and self.config.shares is None:
            a, b = self._factors()
            if is_assembled(x, a, b, (self.d_out, self.d_in)):
                return nn.functional.linear(x, b.weight @ a.weight)
        return multiply(self.get_submodule("b"), self.multiply_first(x))

    def _of_tile(self, x: Tensor) -> Tensor:
        return multiply(self.get_submodule("b"), self.multiply_first_alone(x))

    def _cut_product(self, x: Tensor, rank: int) -> Tensor:
        a, b = (linear.weight for linear in self._factors())
        return nn.functional.linear(nn.functional.linear(x, a[:rank]), b[:, :rank])

    def _factors(self) -> tuple[Any, Any]:
        return self.get_submodule("a"), self.get_submodule("b")

    @torch.no_grad()
    def cut_(self, index: int) -> None:
        """Cut the factors to one of the budgets, which are counted from 0, and free the rest."""
        old, self.config = self.config, self.config.at_budget(index)
        rank = self.config.sizes["rank"]
        for name, linear in zip(("a", "b"), self._factors(), strict=True):
            for key, parameter in linear.named_parameters():
                cut = cut_tensor(f"{name}.{key}", parameter, old, rank)
                setattr(linear, key, nn.Parameter(cut, requires_grad=parameter.requires_grad))
            for key, buffer in linear.named_buffers():
                setattr(linear, key, cut_tensor(f"{name}.{key}", buffer, old, rank))
        first, second = self._factors()
        first.out_features = second.in_features = rank

    def matrix(self) -> Tensor:
        """Return ``B @ A`` [d_out, d_in] in float32."""
        b: Any = self.get_submodule("b")
        B: Tensor = b.weight.float()
        return B @ self.first_matrix(B)


def cut_tensor(name: str, tensor: Tensor, config: ComponentConfig, rank: int) -> Tensor:
    """Return a copy of what a lower rank needs of a stored tensor.

    These are the first rows of the factor ``a`` and the first columns of ``b``. Integers of both
    keep their scales, of which every row has one.

    Parameters
    ----------
    name : str
        Within the component, for example ``b.weight_packed``.
    tensor : Tensor
    config : ComponentConfig
        Of the component before the cut.
    rank : int
        The lower rank.
    """
    factor, leaf = name.split(".")
    if leaf == "weight_shape":
        shape = tensor.clone()
        shape[0 if factor == "a" else 1] = rank
        return shape
    if factor == "a":
        return tensor[:rank].clone()
    if leaf == "weight_packed":
        assert config.quantization is not None
        bits = config.quantization.bits
        codes = unpack_integers(tensor, bits, config.sizes["rank"])
        return repack_integers(codes[:, :rank], bits)
    columns = tensor[:, :rank] if leaf == "weight" else tensor
    return columns.clone(memory_format=torch.contiguous_format)
