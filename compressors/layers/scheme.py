"""How integers of few bits stand for the numbers of a matrix, and what that takes in the file.

A scheme is written as people say it: ``int8`` has one scale a row, ``int4-g64`` one for every 64
numbers of a row, and ``int4-g64-asymmetric`` a zero point beside every scale. The tensors are those
of compressed-tensors' ``pack-quantized`` format, so that a matrix of integers alone can be read by
whatever reads that. What stands row after row without gaps, the values of a sparse weight, has
groups that do not end with the rows, and no shape to tell.
"""

import re
from dataclasses import dataclass
from functools import cache
from math import ceil, prod

import torch

Leaves = dict[str, tuple[list[int], torch.dtype | None]]
"""Tensor name within the module -> shape, and dtype where it is not the model's."""

MIN_BITS, MAX_BITS = 2, 8
VALUES_GROUP = 128
"""Values to a scale, of a scheme that has one scale a row, where there are no rows."""
WRITTEN = re.compile(r"int(\d)(?:-g([1-9]\d*))?(-asymmetric)?")


@dataclass(frozen=True)
class Scheme:
    """Integers of `bits` bits, and a scale for every `group_size` of them in a row.

    Raises
    ------
    ValueError
        If there is no such scheme.
    """

    bits: int
    group_size: int | None = None
    """Numbers in a row that share a scale; None for all of the row."""
    symmetric: bool = True
    """Whether zero is the middle of the range; else every scale has a zero point."""

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be in [{MIN_BITS}, {MAX_BITS}], got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    @classmethod
    @cache
    def read(cls, written: str) -> "Scheme":
        """Read a scheme as it is written in plans and configs.

        Raises
        ------
        ValueError
            If it is none.
        """
        found = WRITTEN.fullmatch(written)
        if found is None:
            raise ValueError(
                f"must be written like int8, int4-g64 or int4-g64-asymmetric, got {written!r}"
            )
        bits, group, asymmetric = found.groups()
        return cls(int(bits), None if group is None else int(group), asymmetric is None)

    def __str__(self) -> str:
        """Return the scheme as it is written."""
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"int{self.bits}{group}{'' if self.symmetric else '-asymmetric'}"

    @property
    def lowest(self) -> int:
        """The least code; codes are signed, ``lowest`` to ``-lowest - 1``."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The greatest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Count the scales of a row.

        Raises
        ------
        ValueError
            If the groups do not fill the row.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise ValueError(
                f"rows of {columns} numbers are no multiple of the group size {self.group_size}"
            )
        return columns // self.group_size

    def matrix(self, leaf: str, shape: list[int]) -> Leaves:
        """Return the tensors that stand for a matrix named `leaf`, such as ``a.weight``.

        Raises
        ------
        ValueError
            If the groups do not fill its rows.
        """
        rows, columns = shape
        groups = self.groups(columns)
        tensors: Leaves = {
            f"{leaf}_packed": ([rows, ceil(columns * self.bits / 32)], torch.int32),
            f"{leaf}_scale": ([rows, groups], None),
            f"{leaf}_shape": ([2], torch.int64),
        }
        if not self.symmetric:
            tensors[f"{leaf}_zero_point"] = [ceil(rows * self.bits / 32), groups], torch.int32
        return tensors

    def values(self, leaf: str, shape: list[int]) -> Leaves:
        """Return the tensors that stand for numbers without rows; always symmetric."""
        count = prod(shape)
        return {
            f"{leaf}_packed": ([1, ceil(count * self.bits / 32)], torch.int32),
            f"{leaf}_scale": ([ceil(count / (self.group_size or VALUES_GROUP))], None),
        }

    def stored(self, leaves: Leaves) -> Leaves:
        """Return the tensors of a module whose own are `leaves`: matrices and values as integers.

        Raises
        ------
        ValueError
            If the groups do not fill the rows of a matrix.
        """
        tensors: Leaves = {}
        for leaf, (shape, dtype) in leaves.items():
            if leaf.endswith("weight") and dtype is None:
                tensors |= self.matrix(leaf, shape)
            elif leaf == "values":
                tensors |= self.values(leaf, shape)
            else:
                tensors[leaf] = shape, dtype
        return tensors
