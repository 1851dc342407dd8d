"""The decoding speed that the report of a checkpoint predicts, next to the measured one."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lrc.compressors.benchmark.grid import Mode, Point
from lrc.compressors.benchmark.measure import Samples
from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import read_object
from lrc.compressors.latency.product_timing import device_name
from lrc.compressors.planning.predicted_times import predicted_step
from lrc.configs.errors import CheckpointError


def predicted_ratio(
    folder: Path, point: Point, dense: Samples, *, device: str, dtype: torch.dtype
) -> float | None:
    """Return how many times as fast as the dense model a checkpoint is predicted to generate.

    Parameters
    ----------
    folder : Path
        Of the checkpoint.
    dense : Samples
        Of the dense model at the same point.

    Returns
    -------
    float or None
        None if its report has no times, or times for another number of rows, device, dtype or
        number of threads. Times on a GPU are those of CUDA graphs.
    """
    times = _times(folder)
    on_gpu = device.startswith("cuda")
    if times is None or not dense.decode or dense.failed is not None:
        return None
    here = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": point.batch,
        "threads": None if on_gpu else torch.get_num_threads(),
    }
    if point.mode is not (Mode.GRAPH if on_gpu else Mode.EAGER):
        return None
    if any(times.get(key) != value for key, value in here.items()):
        return None
    step = median(dense.decode) / point.tokens
    try:
        predicted = predicted_step(times, step)
    except (KeyError, TypeError):  # an edited report
        return None
    return step / predicted if predicted > 0 else None


def _times(folder: Path) -> Mapping[str, Any] | None:
    path = folder / layout.REPORT
    if not path.is_file():
        return None
    try:
        times = read_object(path).get("latency")
    except CheckpointError:
        return None
    return times if isinstance(times, dict) else None
