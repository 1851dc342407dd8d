"""A matrix of which n of every eight consecutive entries of a row are stored."""

import torch
from torch import Tensor

from lrc.compressors.kernels.masked import EIGHT_OF
from lrc.compressors.layers.bitmask import BYTE, mask_problems, pack_bits
from lrc.compressors.layers.component import ComponentConfig, check_range
from lrc.compressors.layers.masked_entries import MaskedEntries
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs


class SemiStructured(MaskedEntries):
    """The pattern n:8: `n` values for every group of eight inputs, and one byte for their places.

    Every row and every group has the same number of values, so that the place of a group's values
    follows from its index. A product then needs no row pointers and no count of the bits before it,
    which is what limits the speed of `Sparse` with one input row. Bit j of the byte of group g is
    column 8 g + j, and the values of a group are in ascending order of their columns.

    Without a fast path for the device, the dense matrix is rebuilt for every call.
    """

    TYPE = "semi_structured"
    SIZES = ("n",)
    COARSE = True

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return ``values`` [d_out, d_in / 8, n] and ``mask`` [d_out, d_in / 8]."""
        n = config.sizes["n"]
        if d_in % BYTE:
            raise ValueError(
                f"pattern n:8 needs a number of inputs divisible by 8, got a weight "
                f"[{d_out}, {d_in}]"
            )
        check_range("n", n, BYTE, d_out, d_in)
        groups = d_in // BYTE
        return {
            "values": TensorSpec([d_out, groups, n], role="values"),
            "mask": TensorSpec([d_out, groups], torch.uint8),
        }

    @classmethod
    def largest_step(cls, d_out: int, d_in: int, *, pattern: str | None = None) -> int:
        """Return 8, at which everything is stored; 0 if the inputs are no groups of eight."""
        return 0 if d_in % BYTE else BYTE

    @classmethod
    def describe(cls, d_out: int, d_in: int, config: ComponentConfig) -> str:
        """Return the pattern."""
        return f"{config.sizes['n']}:8"

    @staticmethod
    def encode(W_hat: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the entries of `W_hat` [d_out, d_in] that `mask` [d_out, d_in] selects.

        Raises
        ------
        ValueError
            If the groups have different numbers of entries.
        """
        counts = mask.unflatten(1, (-1, BYTE)).sum(dim=2)  # [d_out, groups]
        fewest, most = counts.aminmax()
        if not 0 < int(fewest) == int(most):
            raise ValueError(
                f"every group of 8 must have equally many entries, got {fewest} to {most}"
            )
        return {"values": W_hat[mask].view(*counts.shape, int(most)), "mask": pack_bits(mask)}

    @property
    def support(self) -> tuple[int, int]:
        """Of how many entries how many are stored."""
        return BYTE, self.config.sizes["n"]

    def layout(self) -> tuple[int, int, int, int]:
        """Return how the values are laid out."""
        return EIGHT_OF, self.d_in, self.config.sizes["n"], self.values_group()

    def matrix(self) -> Tensor:
        """Return the matrix [d_out, d_in] with its zeros."""
        return self.entries()

    def entries(self) -> Tensor:
        """Return the matrix [d_out, d_in] with its zeros."""
        return self.at_places(self.stored_values(), self.d_in)

    def problems(self) -> list[str]:
        """Return violated invariants: every byte of the mask must have `n` bits."""
        mask, n = self.get_buffer("mask"), self.config.sizes["n"]
        count = n * mask.numel()
        return super().problems() + mask_problems(mask, self.d_in, count, pattern=f"{n}:8")
