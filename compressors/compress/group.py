"""A group of weights that are compressed together: what is known about it, and the result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrc.compressors.layers import WeightConfig, reconstruct
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.tasks import LayerResult, LayerTask
from lrc.compressors.solvers.linalg import damped
from lrc.compressors.solvers.moments import Statistics


@dataclass(frozen=True)
class WeightGroup:
    """The weights of a task, their statistics, and the dtype of the file."""

    task: LayerTask
    weights: Sequence[Tensor]
    """One [d_out, d_in] per member: the source weight, or the target of error compensation."""
    statistics: Sequence[Statistics]
    """One per member, on the device of the weights."""
    dtype: torch.dtype
    seed: int = 0
    bias: Tensor | None = None
    """Bias [d_out] of the source layer, for methods that change it."""

    def input_moment(self, member: int) -> Tensor | None:
        """Return the second moment of the inputs if it was accumulated as a whole.

        In the precision in which it is stored: in float64 it would exist twice.
        """
        inputs = self.statistics[member].inputs
        return None if inputs is None or inputs.empty else inputs.full

    def gradient_moment(self, member: int) -> Tensor | None:
        """Return the damped second moment of the output gradients, if errors are weighted by it."""
        part = METHODS[self.task.method].parts.get(self.task.config.at_budget(-1).types)
        gradients = self.statistics[member].gradients
        if part is None or "gradients" not in part.statistics:
            return None
        if gradients is None or gradients.full is None or gradients.empty:
            return None
        return damped(gradients.whole(), self.task.options.get("gradient_damp", 0.0))


@dataclass(frozen=True)
class CompressedGroup:
    """A task with its result and the tensors of the checkpoint by their full names."""

    task: LayerTask
    result: LayerResult
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """Return the weight [d_out, d_in] that the tensors of a member represent."""
        return stored_weight(self.task, self.result, name, self.tensors.__getitem__)


def component_tensors(
    config: WeightConfig, parts: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors of all components by their names within the layer, as far as it has them.

    Only the first layer of several has a factor that they share.
    """
    found = {
        f"{component.type}.{leaf}": tensor
        for component, leaves in zip(config.components, parts, strict=True)
        for leaf, tensor in leaves.items()
    }
    return {leaf: found[leaf] for leaf in found if leaf in config.tensors()}


def stored_weight(
    task: LayerTask, result: LayerResult, name: str, read: Callable[[str], Tensor]
) -> Tensor:
    """Return the weight [d_out, d_in] of a member after compression.

    Parameters
    ----------
    result : LayerResult
        Of a compressed weight, or of a dense one that was refit.
    name : str
        Of the member.
    read : callable
        Returns a stored tensor by its full name.
    """
    if not result.config.compressed:
        return read(f"{name}.weight")
    weight = next(w for w in task.weights if w.name == name)
    return reconstruct(
        task.config_of(weight, result.config),
        lambda leaf: read(f"{name}.{leaf}"),
        lambda leaf: read(f"{task.name}.{leaf}"),
    )


def left_dense(task: LayerTask, reason: str | None = None) -> CompressedGroup:
    """Return a group that stays as it is in the source; `reason` is a fallback from the plan."""
    return CompressedGroup(task, LayerResult(WeightConfig(task.shape), fallback=reason))


def joined(*notes: str | None) -> str | None:
    """Return the notes that are not None as one, without repetitions."""
    return "; ".join(dict.fromkeys(note for note in notes if note)) or None
