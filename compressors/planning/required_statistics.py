"""Which statistics a task needs."""

from dataclasses import replace

from lrc.compressors.methods.table import METHODS, Quantization
from lrc.compressors.planning.tasks import LayerTask


def solver_statistics(task: LayerTask) -> frozenset[str]:
    """Return the fields of `Statistics` that the solvers of a task read."""
    if not task.compressed:
        return frozenset()
    quantize = task.quantize
    sees_inputs = quantize is not None and (
        quantize.quantizer == "gptq" or quantize.correction is not None
    )
    return METHODS[task.method].statistics | ({"inputs"} if sees_inputs else set())


def with_statistics(task: LayerTask) -> LayerTask:
    """Return the task with what calibration has to collect.

    A weight that is only quantized, on the inputs that the compressed model produces, is measured
    during compression.
    """
    needed = solver_statistics(task)
    method = METHODS[task.method]
    if isinstance(method, Quantization) and task.compensate is not None:
        needed = frozenset()
    if method.full_moments or task.quantize is not None:  # quantization leaves the weight's span
        needed |= {f"whole_{side}" for side in ("inputs", "gradients") if side in needed}
    return replace(task, statistics=tuple(sorted(needed)))
