"""Integer quantization of weights: parameters, and the tensors that store a quantized matrix.

The string form is the one that recipes and configs use: ``int8`` has one scale per row,
``int4-g64`` one scale for every 64 numbers of a row, and ``int4-g64-asymmetric`` adds a zero point
per scale. With ``int3-g16-s256`` the scales of every super-block, 256 numbers of a row, are small
multiples of a common number, as in the K-quants of llama.cpp. Tensors follow the ``pack-quantized``
format of compressed-tensors, so that libraries which read that format can read a weight that
consists of one quantized matrix.
"""

import re
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Literal, NamedTuple

import torch

MIN_BITS, MAX_BITS = 2, 8
VALUES_GROUP = 128
"""Values per scale where `group_size` is None and the numbers are not arranged in rows."""
SUPER_BLOCK = 256
"""Numbers of a row whose scales are multiples of a common number."""
PATTERN = re.compile(rf"int(\d)(?:-g([1-9]\d*))?(-s{SUPER_BLOCK}|-asymmetric)?")


class TensorSpec(NamedTuple):
    """Shape and type of one stored tensor."""

    shape: list[int]
    dtype: torch.dtype | None = None
    """None for the dtype of the model."""
    role: Literal["matrix", "values", "index"] = "index"
    """Matrices and values can be quantized; indices, masks and scales are stored as they are."""


TensorSpecs = dict[str, TensorSpec]
"""Name of a tensor within its module -> its specification."""


@dataclass(frozen=True)
class QuantizationArgs:
    """Integers of `bits` bits with one scale for every `group_size` numbers of a row.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    bits: int
    group_size: int | None = None
    """Consecutive numbers of a row that share a scale; None for the whole row."""
    symmetric: bool = True
    """Whether code 0 represents zero; otherwise every scale has a zero point."""
    super_blocks: bool = False
    """Whether the scales of every `SUPER_BLOCK` numbers are multiples of a common number."""

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be in [{MIN_BITS}, {MAX_BITS}], got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.super_blocks and (self.group_size is None or SUPER_BLOCK % self.group_size):
            raise ValueError(
                f"group_size must divide the super-block of {SUPER_BLOCK}, got {self.group_size}"
            )
        if self.super_blocks and not self.symmetric:
            raise ValueError("super-blocks have symmetric schemes only, got symmetric=False")

    @classmethod
    @cache
    def parse(cls, text: str) -> "QuantizationArgs":
        """Parse the string form, the inverse of `str`.

        Raises
        ------
        ValueError
            If the text has another form or a value is out of range.
        """
        found = PATTERN.fullmatch(text)
        if found is None:
            raise ValueError(
                "must be written like int8, int4-g64, int4-g64-asymmetric or int3-g16-s256, got "
                f"{text!r}"
            )
        bits, group, rest = found.groups()
        group_size = None if group is None else int(group)
        return cls(int(bits), group_size, rest != "-asymmetric", rest not in (None, "-asymmetric"))

    def __str__(self) -> str:
        """Return the string form."""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        rest = f"-s{SUPER_BLOCK}" if self.super_blocks else "" if self.symmetric else "-asymmetric"
        return f"int{self.bits}{group}{rest}"

    @property
    def lowest(self) -> int:
        """The smallest code; codes are signed."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def row_multiple(self) -> int:
        """The number of which the length of a row must be a multiple."""
        return SUPER_BLOCK if self.super_blocks else self.group_size or 1

    def divides(self, columns: int) -> bool:
        """Return whether rows of `columns` numbers consist of whole groups and super-blocks."""
        return columns % self.row_multiple == 0

    def groups(self, columns: int) -> int:
        """Return the number of scales per row.

        Raises
        ------
        ValueError
            If the group size does not divide the row.
        """
        if not self.divides(columns):
            unit = "super-block" if self.super_blocks else "group size"
            raise ValueError(
                f"rows of {columns} numbers are not a multiple of the {unit} {self.row_multiple}"
            )
        return 1 if self.group_size is None else columns // self.group_size

    def matrix_specs(self, name: str, shape: list[int]) -> TensorSpecs:
        """Return the tensors that store a matrix called `name`, for example ``a.weight``.

        Raises
        ------
        ValueError
            If the group size does not divide its rows.
        """
        rows, columns = shape
        groups = self.groups(columns)
        specs = {
            f"{name}_packed": TensorSpec([rows, ceil(columns * self.bits / 32)], torch.int32),
            f"{name}_scale": TensorSpec([rows, groups]),
            f"{name}_shape": TensorSpec([2], torch.int64),
        }
        if not self.symmetric:
            zero = [ceil(rows * self.bits / 32), groups]
            specs[f"{name}_zero_point"] = TensorSpec(zero, torch.int32)
        return specs

    def values_specs(self, name: str, shape: list[int]) -> TensorSpecs:
        """Return the tensors that store numbers without row structure; always symmetric."""
        count = prod(shape)
        return {
            f"{name}_packed": TensorSpec([1, ceil(count * self.bits / 32)], torch.int32),
            f"{name}_scale": TensorSpec([ceil(count / (self.group_size or VALUES_GROUP))]),
        }

    def quantized_specs(self, specs: TensorSpecs) -> TensorSpecs:
        """Return the stored tensors of a module whose matrices and values are quantized.

        Raises
        ------
        ValueError
            If the group size does not divide the rows of a matrix.
        """
        stored: TensorSpecs = {}
        for name, spec in specs.items():
            if spec.role == "matrix":
                stored |= self.matrix_specs(name, spec.shape)
            elif spec.role == "values":
                stored |= self.values_specs(name, spec.shape)
            else:
                stored[name] = spec
        return stored
