"""The predicted loss increase of every matrix at all sizes that an allocation may choose."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.candidates import Candidate, candidates_for
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.tasks import LayerTask

POINTS = 24
"""Sizes that are shown of a matrix, at most."""


@dataclass(frozen=True)
class SizeLoss:
    """One size of a matrix."""

    bits: float
    """Stored bits per weight."""
    nats: float
    """Predicted loss increase, nats per token."""
    form: str
    """Components, with sizes and integers."""


LossCurves = Mapping[str, Sequence[SizeLoss]]
"""Matrix -> its sizes, smallest first, the dense matrix last."""


def loss_curves(plan: Plan, curves: Mapping[str, Curve]) -> LossCurves:
    """Return the sizes of all pending tasks whose losses can be predicted.

    Parameters
    ----------
    plan : Plan
        Before allocation.
    curves : mapping of str to Curve
        Of its pending tasks.
    """
    found = {}
    for task in plan.tasks:
        if task.allocation is None or plan.allocations[task.allocation].allocator != "lagrangian":
            continue
        curve = curves[task.name]
        nats = METHODS[task.method].predicted_increase
        if curve.comparable and not curve.note and nats(0.0, curve.n_tokens) is not None:
            offered = candidates_for(task, curve, plan.allocations[task.allocation])
            found[task.name] = list(_sizes(task, offered, curve.n_tokens, nats))
    return found


def curves_json(curves: LossCurves) -> dict[str, Any]:
    """Return curves as JSON values."""
    return {name: [asdict(size) for size in sizes] for name, sizes in curves.items()}


def _sizes(
    task: LayerTask,
    offered: Sequence[Candidate],
    n_tokens: int,
    nats: Callable[[float, int], float | None],
) -> Iterator[SizeLoss]:
    numbers = len(task.weights) * prod(task.shape)
    step = max(1, len(offered) // POINTS)
    for candidate in [*offered[:-1:step], offered[-1]]:
        loss = nats(candidate.loss, n_tokens)
        assert loss is not None
        config = candidate.config
        words = [config.types, config.description, str(config.quantization or "")]
        form = " ".join(dict.fromkeys(filter(None, words))) if config.compressed else "dense"
        yield SizeLoss(task.bits_of(config) / numbers, loss, form)
