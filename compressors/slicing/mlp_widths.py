"""Solve for the widths of MLPs and heads under a budget, and distribute channels over layers.

Layers are allocated steps of `multiple` channels, which cost the same in every layer. The total
number of steps follows from the budget, before any data is read.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.planning.allocators import lagrangian
from lrc.compressors.slicing.drop import block_influence
from lrc.compressors.slicing.layout import Layout, Mlp
from lrc.compressors.slicing.mlp import loss_curve
from lrc.compressors.slicing.slice_method import Budget
from lrc.compressors.solvers.linalg import whitening_factor
from lrc.configs.slice import Modegpt

# Fraction of heads removed per fraction of MLPs. SmolLM2-135M at 80 % of its bytes: perplexity 43.4
# with narrower MLPs alone, 47.2 with heads of 56 instead of 64, 56.8 with heads of 48 (equal
# fractions); at 60 % 124, 130 and 138. So heads are narrowed last, but before MLPs almost vanish.
HEAD_FRACTION = 0.1
# Epsilon in the paper. SmolLM2-135M at 80 % of its bytes, on 12,288 tokens of C4, evaluated on four
# windows of its validation split: perplexity 39.03 with equal widths, 36.89 by influence and 38.32
# by loss curves, which take 60 % of some middle layers; dense 23.95.
TEMPERATURE = 0.1
REQUIRED_STATISTICS = frozenset({"inputs", "whole_inputs", "gradients", "whole_gradients"})


def solve_widths(
    layout: Layout, head_dim: int | None, multiple: int, budget: Budget
) -> tuple[int, int | None]:
    """Return the widths of MLPs and of heads that fit the budget; None leaves heads unchanged."""
    size = layout.bytes
    dense = size(layout.width, head_dim)
    channel = dense - size(layout.width - 1, head_dim)
    choices: list[int | None] = [None]
    if head_dim is not None:
        dimension = dense - size(layout.width, head_dim - 1)
        removable = layout.width * channel + HEAD_FRACTION * head_dim * dimension
        kept = 1 - HEAD_FRACTION * (dense - budget.bytes) / removable
        step = math.lcm(multiple, 2)
        possible = [*range(step, head_dim, step), head_dim]
        nearest = min(possible, key=lambda n: abs(n - kept * head_dim))
        choices = [n for n in reversed(possible) if n <= nearest]
    for narrower in choices:
        spare = budget.bytes - size(layout.width, narrower)
        width = layout.width - max(0, math.ceil(-spare / channel))
        if width < layout.width:
            width -= width % multiple
        if width >= min(multiple, layout.width):
            return width, narrower
    smallest = min(multiple, layout.width)
    heads = "" if head_dim is None else f" and heads of {choices[-1]}"
    raise budget.too_small(
        size(smallest, choices[-1]),
        f"MLPs of {smallest} channels{heads}, the smallest",
        "slice with 'drop', which removes whole layers",
    )


def even_widths(
    layout: Layout, width: int, head_dim: int | None, multiple: int, budget: Budget
) -> list[int]:
    """Return MLP widths that use the budget up, given common widths that fit it."""
    n_layers = len(layout.mlps)
    size = layout.bytes(width, head_dim)
    channel = (size - layout.bytes(width - 1, head_dim)) // n_layers
    channels = n_layers * width + (budget.bytes - size) // channel
    steps = min(channels // multiple, n_layers * (layout.width // multiple))
    return [multiple * count for count in evenly(steps, n_layers)]


def allocate_widths(
    context: CalibrationContext,
    options: Modegpt,
    layout: Layout,
    planned: Mapping[str, Sequence[int]],
) -> tuple[list[int], dict[str, Any]]:
    """Distribute the channels of planned shapes by calibration; return widths and facts."""
    multiple, facts = options.width_multiple, dict[str, Any]()
    most = layout.width // multiple
    widths = [planned.get(mlp.output, [0, layout.width])[1] for mlp in layout.mlps]
    steps = sum(widths) // multiple
    if options.allocation == "influence":
        facts["influence"] = block_influence(context)
        counts = by_influence(facts["influence"], steps, most)
    else:
        curves = mlp_loss_curves(context, layout.mlps, damp=options.damp)
        at = torch.arange(1, most + 1) * multiple - 1
        counts = by_curves([curve[at] for curve in curves], steps)
    return [multiple * count for count in counts], facts


def evenly(steps: int, n_layers: int) -> list[int]:
    """Distribute steps evenly; the first layers receive the remainder."""
    each, more = divmod(steps, n_layers)
    return [each + (layer < more) for layer in range(n_layers)]


def by_influence(influence: Sequence[float], steps: int, most: int) -> list[int]:
    """Remove most steps from the layers that change their input least.

    `influence` is one minus the mean cosine between a layer's input and output. Of `most` steps
    each layer keeps at least one, and all layers together keep `steps`.

    A layer loses the fraction ``softmax(-influence / TEMPERATURE)`` of what is removed, the
    maximiser of kept influence plus entropy in MoDeGPT. What exceeds a whole layer is removed from
    the others in the same proportions.
    """
    n_layers = len(influence)
    fractions = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / TEMPERATURE, dim=0)
    removed = torch.zeros(n_layers, dtype=torch.float64)
    open_ = torch.ones(n_layers, dtype=torch.bool)
    left = float(n_layers * most - steps)
    while left > 1e-9 and bool(open_.any()):
        target = removed + left * fractions * open_ / fractions[open_].sum()
        left = float((target - (most - 1)).clamp_min(0).sum())
        removed = target.clamp_max(most - 1)
        open_ = removed < most - 1
    return _round_to_total(most - removed, steps, most)


def by_curves(curves: Sequence[Tensor], steps: int) -> list[int]:
    """Remove steps where the loss rises least; all layers together keep `steps`.

    `curves` are the losses [most] of each layer with 1, 2, ..., `most` steps, in one unit.
    """
    counts = range(1, len(curves[0]) + 1)
    candidates = [
        [_Width(n, loss) for n, loss in zip(counts, curve.double().tolist(), strict=True)]
        for curve in curves
    ]
    chosen = [index + 1 for index in lagrangian(candidates, steps)]
    # The allocation skips channels that do not lower the loss, but the budget includes them.
    return _round_to_total(torch.tensor(chosen, dtype=torch.float64), steps, len(counts))


class _Width(NamedTuple):
    """A number of steps of the width, and the loss with it."""

    cost: int
    loss: float


@torch.no_grad()
def mlp_loss_curves(context: CalibrationContext, mlps: list[Mlp], *, damp: float) -> list[Tensor]:
    """Return for each MLP the rise of the loss, in nats per token, with 1, 2, ..., d_int channels.

    The second-order rise for an error E of the output weight alone, with inputs and gradients
    assumed independent: ``tr(G E C E^T) / 2``. C and G are the second moments per token of the
    channels and of the gradients at the output, both in the dense model. Decompositions with
    gradients allocate ranks by the same measure.
    """
    curves, device, journal = [], context.device, context.journal
    with torch.enable_grad():
        statistics.collect(context, {mlp.output: REQUIRED_STATISTICS for mlp in mlps})
    for layer, mlp in enumerate(mlps):
        known = statistics.load(journal, layer, mlp.output, device)
        assert known.inputs is not None, "they were requested"
        assert known.gradients is not None, "they were requested"
        C, G = (m.whole() / known.n_tokens for m in (known.inputs, known.gradients))
        L, _ = whitening_factor(G, damp)
        W = context.reader.read(f"{mlp.output}.weight", device=device).double()
        curves.append(loss_curve(L.T @ W, C, damp=damp).cpu() / 2)
        context.on_step("widths", layer + 1, len(mlps))
    journal.forget("statistics", *cache_files(journal))
    return curves


def _round_to_total(target: Tensor, steps: int, most: int) -> list[int]:
    """Round to integers in ``[1, most]`` that sum to `steps`, largest remainders first."""
    found = target.floor().clamp(1, most).long()
    while (missing := steps - int(found.sum())) != 0:
        room = found < most if missing > 0 else found > 1
        toward = (target - found) * (1 if missing > 0 else -1)
        order = torch.where(room, toward, -torch.inf).argsort(descending=True, stable=True)
        chosen = order[: min(abs(missing), int(room.sum()))]
        found[chosen] += 1 if missing > 0 else -1
    return [int(count) for count in found]
