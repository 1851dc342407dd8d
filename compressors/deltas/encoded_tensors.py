"""Encoded tensors of a delta, with their sizes and errors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from lrc.compressors.deltas.delta_codecs import Encoded
from lrc.compressors.deltas.delta_format import Record

DENSE_BITS = 16
"""Bits per number with which deltas are compared, whatever the dtype of the tuned model."""


@dataclass(frozen=True)
class TensorReport:
    """Size and error of one tensor of a delta."""

    name: str
    codec: str
    shape: list[int]
    bits: int
    relative_error: float
    """Norm of the error over the norm of the difference; for a factor of an adapter, that of the
    product."""


@dataclass
class EncodedTensors:
    """Encoded tensors, in the order in which they are written."""

    records: list[Record] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of a tensor of the file -> the parts that it consists of."""
    reports: list[TensorReport] = field(default_factory=list)
    error: float = 0.0
    energy: float = 0.0

    def add(self, name: str, tuned: Tensor, encoded: Encoded, relative_error: float) -> None:
        """Add a tensor."""
        record = Record.of(name, tuned, encoded)
        self.records.append(record)
        for part, key, _ in record.keys:
            self.parts.setdefault(key, []).append(encoded.parts[part])
        shape = list(tuned.shape)
        report = TensorReport(name, encoded.codec, shape, encoded.bits, relative_error)
        self.reports.append(report)

    def measure(self, base: Tensor, tuned: Tensor, decoded: Tensor) -> float:
        """Add the error of a decoded tensor to the totals; return its relative error."""
        error = float((decoded.double() - tuned.double()).square().sum())
        energy = float((tuned.double() - base.double()).square().sum())
        self.error += error
        self.energy += energy
        return (error / energy) ** 0.5 if energy else 0.0

    def sizes(self, numbers: int) -> dict[str, Any]:
        """Return the sizes of all tensors, which have `numbers` numbers in the tuned model."""
        bits = sum(report.bits for report in self.reports)
        return {
            "tensors": len(self.records),
            "numbers": numbers,
            "bits": bits,
            "bits_per_number": bits / numbers,
            "ratio": DENSE_BITS * numbers / bits,
            "relative_error": (self.error / self.energy) ** 0.5,
        }

    def to_json(self) -> list[dict[str, Any]]:
        """Return one entry per tensor."""
        return [asdict(report) for report in self.reports]
