"""Compress matrices of equal shape and configuration together where that takes less time.

GPTQ goes column by column, and on a GPU a step takes as long for one small matrix as for many: a
layer of a mixture of experts has hundreds of equal ones.
"""

from collections.abc import Sequence

import torch

from lrc.compressors.compress.group import CompressedGroup, WeightGroup
from lrc.compressors.compress.solve import compress_group, quantized_weights
from lrc.compressors.planning.equal_tasks import split_batches
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.solvers.gptq import gptq_together
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix

NUMBERS = {"cuda": 2**27}
"""Weights and entries of second moments in a batch, by type of device; solving one that is full
takes about 5 GiB."""


def batches(tasks: Sequence[LayerTask], device: str) -> list[list[LayerTask]]:
    """Split the tasks of a layer into batches for `compress_together`."""

    def kind(task: LayerTask) -> str | None:
        return f"{task.shape} {task.config} {task.quantize}" if _is_gptq(task) else None

    def size(task: LayerTask) -> int:
        d_out, d_in = task.shape
        return (d_out + d_in) * d_in

    return split_batches(tasks, kind, size, NUMBERS.get(torch.device(device).type, 0))


def compress_together(groups: Sequence[WeightGroup]) -> list[CompressedGroup]:
    """Return the results of `compress_group` for the groups of a batch."""
    solved = _solved(groups) if len(groups) > 1 else {}
    return [
        quantized_weights(group, group.task.config, solved=solved[group.task.name])
        if group.task.name in solved
        else compress_group(group)
        for group in groups
    ]


def _is_gptq(task: LayerTask) -> bool:
    """Return whether a task quantizes a whole matrix by GPTQ and does nothing else."""
    how = task.quantize
    components = task.config.components
    return (
        how is not None
        and how.quantizer == "gptq"
        and [component.type for component in components] == ["dense"]
    )


def _solved(groups: Sequence[WeightGroup]) -> dict[str, QuantizedMatrix]:
    """Return the matrices by the names of their tasks, except those without inputs."""
    moments = {group.task.name: H for group in groups if (H := group.input_moment(0)) is not None}
    known = [group for group in groups if group.task.name in moments]
    if not known:
        return {}
    task = known[0].task
    assert task.quantize is not None
    assert task.config.quantization is not None
    try:
        found = gptq_together(
            [group.weights[0] for group in known],
            [*moments.values()],
            task.config.quantization,
            dtype=known[0].dtype,
            damp=task.quantize.damp,
            act_order=task.quantize.act_order,
        )
    except ScaleOverflow:  # of one of them, which is named if they are solved one by one
        return {}
    return dict(zip(moments, found, strict=True))
