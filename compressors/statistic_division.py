"""How the layers of a run are divided if the statistics of all do not fit on the disk."""

from pathlib import Path

from lrc.compressors.calibrate.segments import (
    VALUE_BYTES,
    Segments,
    differentiates,
    divide_layers,
    statistics_bytes,
)
from lrc.compressors.io.disk_use import free_disk, used_disk
from lrc.compressors.planning.required_statistics import required_statistics
from lrc.compressors.prepare import Prepared
from lrc.configs.recipe import Calibration
from lrc.configs.size import GIB


def state_width(prepared: Prepared) -> int:
    """Return the size of a hidden state, 0 if the config does not give it."""
    return int(getattr(prepared.source.config.get_text_config(), "hidden_size", 0) or 0)


def statistic_segments(prepared: Prepared) -> Segments | None:
    """Return how the layers are divided to collect statistics; None if they need not be.

    Without a limit in the recipe, the statistics may take what is free on the disk besides the
    result.
    """
    plan, calibration = prepared.plan, Calibration.model_validate(prepared.plan.calibration)
    required = required_statistics(plan.tasks)
    sizes = statistics_bytes(prepared.architecture, required, stored=True)
    if calibration.disk_limit_gib is None:
        output = Path(prepared.recipe.output).expanduser().absolute()
        limit = free_disk(output) + used_disk(output)
        limit -= 2 * plan.compressed_bytes + sum(record.bytes[1] for record in plan.slices)
        limit -= plan.dense_bytes if prepared.source.gguf is not None else 0
    else:
        limit = int(calibration.disk_limit_gib * GIB)
    if sum(sizes) <= limit:
        return None
    states = VALUE_BYTES * calibration.samples * calibration.window * state_width(prepared)
    return divide_layers(sizes, states, limit, differentiates=differentiates(required))
