"""Measures of the cost of a weight: bits, multiply-adds, time. A budget is a fraction of it."""

from abc import ABC, abstractmethod
from math import prod
from typing import Annotated, ClassVar

from pydantic import PlainSerializer, PlainValidator

from lrc.compressors.latency.latency_table import LatencyTable
from lrc.compressors.layers import WeightConfig
from lrc.compressors.layers.gguf_types import BlockType, block_type


class Measure(ABC):
    """What a budget counts, in whole numbers. Costs depend on shapes and configurations alone."""

    name: ClassVar[str]
    """As recipes write it."""
    words: ClassVar[str]
    """For messages: a fraction "of the ..."."""
    provisional = False
    """Whether costs are not known yet, and those in bits stand in for them."""

    @abstractmethod
    def dense(self, shape: tuple[int, int], bits: int) -> int:
        """Return the cost of a dense weight, which takes `bits`."""

    @abstractmethod
    def compressed(self, config: WeightConfig, bits: int) -> int:
        """Return the cost of a weight with at least one component, which takes `bits`."""


class Bits(Measure):
    """Stored bits."""

    name, words = "bits", "bits"

    def dense(self, shape: tuple[int, int], bits: int) -> int:
        """Return the bits."""
        return bits

    def compressed(self, config: WeightConfig, bits: int) -> int:
        """Return the bits."""
        return bits


class MultiplyAdds(Measure):
    """Multiply-adds per token."""

    name, words = "macs", "multiply-adds"

    def dense(self, shape: tuple[int, int], bits: int) -> int:
        """Return one per entry."""
        return prod(shape)

    def compressed(self, config: WeightConfig, bits: int) -> int:
        """Return those of all components."""
        return config.multiply_adds()


class GgufBits(Measure):
    """Bits in a GGUF file, which holds matrices of integers in blocks and all others in 16 bits."""

    name, words = "gguf", "bits in GGUF"

    def dense(self, shape: tuple[int, int], bits: int) -> int:
        """Return the bits."""
        return bits

    def compressed(self, config: WeightConfig, bits: int) -> int:
        """Return the bits of the smallest block type, or of the dense matrix."""
        args, size = config.quantization, prod(config.shape)
        found = None if args is None else block_type(args, config.shape[1])
        if config.types == "dense" and isinstance(found, BlockType):
            return size // found.block * found.bytes * 8
        return size * 16


class Latency(Measure):
    """Nanoseconds of the product on the device of a table.

    Parameters
    ----------
    table : LatencyTable, optional
        Without one, times have yet to be measured, and costs are provisional.
    """

    name, words = "latency", "time"

    def __init__(self, table: LatencyTable | None = None) -> None:
        self.table = table
        self.provisional = table is None
        self._digest = "" if table is None else table.digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Latency) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def dense(self, shape: tuple[int, int], bits: int) -> int:
        """Return the time of the dense product."""
        return bits if self.table is None else self.table.dense(shape)

    def compressed(self, config: WeightConfig, bits: int) -> int:
        """Return the time of the products with all components."""
        return bits if self.table is None else self.table.of(config)


BITS, MACS, GGUF = Bits(), MultiplyAdds(), GgufBits()


def measure_of(name: str, table: LatencyTable | None = None) -> Measure:
    """Return the measure that a recipe names."""
    measures: dict[str, Measure] = {each.name: each for each in (BITS, MACS, GGUF)}
    return measures[name] if name in measures else Latency(table)


def _parse(value: object) -> Measure:
    if isinstance(value, Measure):
        return value
    if value not in (BITS.name, MACS.name, GGUF.name, Latency.name):
        raise ValueError(f"must be bits, macs, gguf or latency, got {value!r:.60}")
    return measure_of(str(value))


MeasureField = Annotated[Measure, PlainValidator(_parse), PlainSerializer(lambda m: m.name)]
"""Serialized as its name; a plan stores the table of its times once, see `Plan.from_json`."""
