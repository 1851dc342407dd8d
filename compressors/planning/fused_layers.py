"""Layers that serving engines fuse into one, which must then have the same integer format."""

from collections.abc import Iterable, Sequence

from torch import nn

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.tasks import LayerTask

FUSED = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
    {"query", "key", "value"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
)
"""Last parts of the names of layers that vLLM and SGLang multiply by as one matrix."""


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of layers, two or more each, that are fused."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for number, leaves in enumerate(FUSED):
            if leaf in leaves:
                groups.setdefault((parent, number), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def gives_plain_integers(
    tasks: Iterable[LayerTask],
    embeddings: Iterable[LayerTask],
    allocations: Sequence[Allocation],
    architecture: Architecture,
) -> bool:
    """Return whether a plain checkpoint of integers is planned, which serving engines may read."""
    whole = [task for task in tasks if task.compressed]
    heads = (architecture.model.get_submodule(task.name) for task in embeddings)
    return (
        bool(whole)
        and all(isinstance(head, nn.Linear) for head in heads)
        and all(_is_plain(task, allocations) for task in whole)
    )


def _is_plain(task: LayerTask, allocations: Sequence[Allocation]) -> bool:
    if task.allocation is not None:
        schemes = allocations[task.allocation].quantization
        only = not allocations[task.allocation].types and bool(schemes)
        return only and all(args.symmetric for args in schemes)
    return task.config.plain_integers


def fused_warnings(tasks: Iterable[LayerTask], names: Iterable[str]) -> list[str]:
    """Return a warning if layers that are fused get different formats, or one of them none.

    Parameters
    ----------
    tasks : iterable of LayerTask
        Tasks of a plan for which `gives_plain_integers` is true. Within one allocation, fused
        layers get the same format, so only layers of different allocations are compared.
    names : iterable of str
        Names of all linear layers.
    """
    formats = {
        weight.name: f"allocation {task.allocation}" if task.pending else task.config.quantization
        for task in tasks
        for weight in task.weights
    }
    differ = [
        group for group in fused_groups(names) if len({formats.get(name) for name in group}) > 1
    ]
    if not differ:
        return []
    leaves = ", ".join(name.rpartition(".")[2] for name in differ[0])
    return [
        f"stages: {leaves} of {differ[0][0].rpartition('.')[0]} do not all get the same integer "
        f"format ({len(differ)} such groups); serving engines that fuse these layers refuse the "
        "checkpoint: target all of a group with the same 'bits', or none"
    ]
