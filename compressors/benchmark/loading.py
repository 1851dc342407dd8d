"""Load the models of a benchmark, and record what loading takes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lrc.compressors.benchmark.measured_models import Target
from lrc.compressors.benchmark.memory import Meter, fit_together, read_pages, weight_bytes
from lrc.compressors.benchmark.timing import Timer
from lrc.compressors.checkpoint.reader import load_checkpoint

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Loading:
    """What loading a model takes; all sizes in bytes."""

    seconds: float
    """With files that the system has cached, until every weight has been read; includes the
    comparison of files with their hashes."""
    weight_bytes: int
    """Of parameters and buffers."""
    resident_bytes: int
    """By which memory in use has grown."""
    peak_bytes: int
    """By which it had grown at most while the model was loaded."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    model: Any
    loading: Loading


def load(
    target: Target,
    *,
    device: str,
    dtype: torch.dtype,
    meter: Meter,
    timer: Timer,
    trusted: bool = False,
) -> Loaded:
    """Load a model as `from_pretrained` does.

    Raises
    ------
    CheckpointError, ModelError
    """
    target.read_through()
    models: list[Any] = []

    def run() -> None:
        model = load_checkpoint(
            target.folder, dtype=dtype, device=device, trust_remote_code=trusted
        )
        if device == "cpu":
            read_pages(model)
        models.append(model)

    with meter.peak() as peak:
        before = meter.used()
        seconds = timer(run)
        resident = meter.used() - before
    model = models.pop().requires_grad_(False)
    return Loaded(model, Loading(seconds, weight_bytes(model), resident, peak.grown))


def turns_together(targets: Sequence[Target], dtype: torch.dtype, meter: Meter) -> bool:
    """Return whether all models can be in memory at the same time, to take turns."""
    return fit_together([target.loaded_bytes(dtype) for target in targets], meter.available())
