"""Encoded tensors of a delta, with their sizes and errors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from lrc.compressors.deltas.calibrated_moments import Moments
from lrc.compressors.deltas.delta_codecs import Encoded
from lrc.compressors.deltas.delta_format import Record

NONE = Moments()
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
    weighted_error: float | None = None
    """The same in the metric of a calibration, if there is one."""


@dataclass
class EncodedTensors:
    """Encoded tensors, in the order in which they are written."""

    records: list[Record] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    """Name of a tensor of the file -> the parts that it consists of."""
    reports: list[TensorReport] = field(default_factory=list)
    error: float = 0.0
    energy: float = 0.0
    weighted_error: float = 0.0
    weighted_energy: float = 0.0

    def add(
        self, name: str, tuned: Tensor, encoded: Encoded, errors: tuple[float, float | None]
    ) -> None:
        """Add a tensor, with the errors that `measure` has returned."""
        record = Record.of(name, tuned, encoded)
        self.records.append(record)
        for part, key, _ in record.keys:
            self.parts.setdefault(key, []).append(encoded.parts[part])
        shape = list(tuned.shape)
        report = TensorReport(name, encoded.codec, shape, encoded.bits, *errors)
        self.reports.append(report)

    def measure(
        self, base: Tensor, tuned: Tensor, decoded: Tensor, metric: Moments = NONE
    ) -> tuple[float, float | None]:
        """Add the error of a decoded tensor to the totals.

        Returns
        -------
        relative_error : float
        weighted_error : float or None
            In `metric`, if that has moments.
        """
        wrong, change = decoded.double() - tuned.double(), tuned.double() - base.double()
        error, energy = float(wrong.square().sum()), float(change.square().sum())
        self.error += error
        self.energy += energy
        relative = (error / energy) ** 0.5 if energy else 0.0
        if not metric.known:
            return relative, None
        error, energy = metric.energy(wrong), metric.energy(change)
        self.weighted_error += error
        self.weighted_energy += energy
        return relative, (error / energy) ** 0.5 if energy else 0.0

    def sizes(self, numbers: int) -> dict[str, Any]:
        """Return the sizes of all tensors, which have `numbers` numbers in the tuned model."""
        bits = sum(report.bits for report in self.reports)
        total = self.weighted_energy
        weighted = {"weighted_error": (self.weighted_error / total) ** 0.5} if total else {}
        return {
            "tensors": len(self.records),
            "numbers": numbers,
            "bits": bits,
            "bits_per_number": bits / numbers,
            "ratio": DENSE_BITS * numbers / bits,
            "relative_error": (self.error / self.energy) ** 0.5,
            **weighted,
        }

    def to_json(self) -> list[dict[str, Any]]:
        """Return one entry per tensor."""
        reports = map(asdict, self.reports)
        return [{k: v for k, v in each.items() if v is not None} for each in reports]
