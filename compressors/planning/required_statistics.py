"""Which statistics a task needs."""

from collections.abc import Iterable
from dataclasses import replace

from lrc.compressors.methods.table import METHODS, Quantization
from lrc.compressors.planning.tasks import LayerTask


def solver_statistics(task: LayerTask) -> frozenset[str]:
    """Return the fields of `Statistics` that the solvers of a task read."""
    if not task.compressed:
        return frozenset()
    needed, how = METHODS[task.method].statistics, task.quantize
    if how is not None and (how.quantizer == "gptq" or how.correction is not None):
        return needed | {"inputs"}
    return needed


def caps_tokens(task: LayerTask) -> bool:
    """Return whether massive tokens are to weigh less: in the quantization of whole weights."""
    return isinstance(METHODS[task.method], Quantization)


def with_statistics(task: LayerTask) -> LayerTask:
    """Return the task with what calibration has to collect.

    A weight that is only quantized, on the inputs that the compressed model produces, is measured
    during compression; those of experts in any case, because some may receive too few tokens.
    """
    needed = solver_statistics(task)
    method = METHODS[task.method]
    if "inputs" in needed and caps_tokens(task):
        needed |= {"capped_inputs"}
    compensate = task.compensate
    if isinstance(method, Quantization) and compensate is not None and not compensate.routed:
        needed = frozenset()
    # The error of quantization is not in the span that an image through the weight shows.
    if method.full_moments or task.quantize is not None:
        needed |= {f"whole_{side}" for side in ("inputs", "gradients") if side in needed}
    return replace(task, statistics=tuple(sorted(needed)))


def required_statistics(tasks: Iterable[LayerTask]) -> dict[str, tuple[str, ...]]:
    """Return the statistics that calibration has to collect for some tasks, by linear."""
    return {w.name: task.statistics for task in tasks if task.statistics for w in task.weights}
