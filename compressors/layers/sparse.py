"""A matrix of which some entries are stored, with a bit mask of their positions."""

import torch
from torch import Tensor

from lrc.compressors.kernels.masked import EIGHT_OF, FREE
from lrc.compressors.layers.bitmask import (
    BYTE,
    mask_problems,
    pack_bits,
    packed_width,
)
from lrc.compressors.layers.component import ComponentConfig, Sizes, check_range
from lrc.compressors.layers.masked_entries import MaskedEntries
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs


class Sparse(MaskedEntries):
    """Values row by row without gaps, and one bit per entry that says where they belong.

    `nonzeros` is the number of values of the whole matrix. With pattern 2:4 every four consecutive
    entries of a row hold two values, so that the mask takes as many bits as the two 2-bit indices
    of sparse tensor cores. Without a fast path the dense matrix is rebuilt for every call: this
    saves memory, not arithmetic.
    """

    TYPE = "sparse"
    SIZES = ("nonzeros",)
    PATTERNS = ("2:4",)

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return ``values`` [nonzeros] and ``mask`` [d_out, ceil(d_in / 8)]."""
        nonzeros = config.sizes["nonzeros"]
        check_range("nonzeros", nonzeros, d_out * d_in, d_out, d_in)
        if config.pattern is not None and nonzeros != _two_of_four(d_out, d_in):
            raise ValueError(
                f"pattern 2:4 needs nonzeros {_two_of_four(d_out, d_in)} for [{d_out}, {d_in}], "
                f"got {nonzeros}"
            )
        return {
            "values": TensorSpec([nonzeros], role="values"),
            "mask": TensorSpec([d_out, packed_width(d_in)], torch.uint8),
        }

    @classmethod
    def sizes_at(
        cls, step: int, d_out: int, d_in: int, *, ratio: float = 2.0, pattern: str | None = None
    ) -> Sizes:
        """Return the number of values; pattern 2:4 has a single size."""
        return {"nonzeros": step if pattern is None else _two_of_four(d_out, d_in)}

    @classmethod
    def largest_step(cls, d_out: int, d_in: int, *, pattern: str | None = None) -> int:
        """Return the number of entries."""
        return d_out * d_in

    @classmethod
    def describe(cls, d_out: int, d_in: int, config: ComponentConfig) -> str:
        """Return the fraction of entries that are stored."""
        return f"{config.sizes['nonzeros'] / (d_out * d_in):.1%} of entries"

    @staticmethod
    def encode(W_hat: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the entries of `W_hat` [d_out, d_in] that `mask` [d_out, d_in] selects."""
        return {"values": W_hat[mask], "mask": pack_bits(mask)}

    @property
    def support(self) -> tuple[int, int]:
        """Of how many entries how many are stored: of all, or two of four."""
        if self.config.pattern is not None:
            return 4, 2
        return self.d_out * self.d_in, self.config.sizes["nonzeros"]

    def layout(self) -> tuple[int, int, int, int]:
        """Return how the values are laid out; 2:4 in whole units of eight columns is 4:8."""
        if self.config.pattern == "2:4" and self.d_in % BYTE == 0:
            return EIGHT_OF, self.d_in, 4, self.values_group()
        return FREE, self.d_in, 0, self.values_group()

    def matrix(self) -> Tensor:
        """Return the matrix [d_out, d_in] with its zeros."""
        return self.entries()

    def entries(self) -> Tensor:
        """Return the matrix [d_out, d_in] with its zeros."""
        return self.at_places(self.stored_values(), self.d_in)

    def problems(self) -> list[str]:
        """Return violated invariants: the mask must have as many bits as there are values."""
        mask, count = self.get_buffer("mask"), self.config.sizes["nonzeros"]
        pattern = self.config.pattern
        return super().problems() + mask_problems(mask, self.d_in, count, pattern=pattern)


def _two_of_four(d_out: int, d_in: int) -> int:
    if d_in % 4:
        raise ValueError(
            f"pattern 2:4 needs a number of inputs divisible by 4, got a weight [{d_out}, {d_in}]"
        )
    return d_out * d_in // 2
