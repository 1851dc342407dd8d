"""A width for each MLP: how many of the channels that a model keeps each layer gets.

All layers count in steps of the same number of channels, which cost the same in every layer: what
is shared out is a number of steps, known before any data is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrc.compressors.planning.allocators import Options, lagrangian

# The paper writes epsilon for it. SmolLM2-135M at 80 % of its bytes, on 12,288 tokens of C4, four
# windows of its validation: perplexity 39.03 with one width, 36.89 by influence and 38.32 by the
# lagrangian, which takes 60 % of some layers in the middle; dense 23.95.
TEMPERATURE = 0.1


def evenly(steps: int, n_layers: int) -> list[int]:
    """Share out steps evenly, what is left over to the first layers."""
    each, more = divmod(steps, n_layers)
    return [each + (layer < more) for layer in range(n_layers)]


def by_influence(influence: Sequence[float], steps: int, most: int) -> list[int]:
    """Take most from the layers that change their input least.

    Parameters
    ----------
    influence : sequence of float
        One minus the mean cosine between a layer's input and output.
    steps : int
        What all layers keep together, in ``[n_layers, n_layers * most]``.
    most : int
        Steps of a layer as it is; each keeps one at least.

    Notes
    -----
    Of what goes, a layer loses the share ``softmax(-influence / TEMPERATURE)``, the maximiser of
    kept influence plus entropy in [1]_; what that would take beyond all of a layer, the others
    lose in the same proportions.

    References
    ----------
    .. [1] C.-H. Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression",
       ICLR 2025. https://arxiv.org/abs/2408.09632
    """
    n_layers = len(influence)
    shares = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / TEMPERATURE, dim=0)
    gone = torch.zeros(n_layers, dtype=torch.float64)
    open_ = torch.ones(n_layers, dtype=torch.bool)
    left = float(n_layers * most - steps)
    while left > 1e-9 and bool(open_.any()):
        wanted = gone + left * shares * open_ / shares[open_].sum()
        left = float((wanted - (most - 1)).clamp_min(0).sum())
        gone = wanted.clamp_max(most - 1)
        open_ = gone < most - 1
    return _rounded(most - gone, steps, most)


def by_curves(curves: Sequence[Tensor], steps: int) -> list[int]:
    """Take where the loss rises least.

    Parameters
    ----------
    curves : sequence of Tensor, shape [most]
        What is lost where a layer keeps 1, 2, ..., `most` steps; in one unit for all layers.
    steps : int
        What all layers keep together.
    """
    counts = torch.arange(1, len(curves[0]) + 1)
    options = [Options(counts, counts, curve.double().cpu()) for curve in curves]
    chosen = [index + 1 for index in lagrangian(options, steps)]
    # Channels that nobody would miss are not asked for, but they are paid.
    return _rounded(torch.tensor(chosen, dtype=torch.float64), steps, len(counts))


def _rounded(wanted: Tensor, steps: int, most: int) -> list[int]:
    """Round to whole numbers in ``[1, most]`` that add up to `steps`, largest remainders first."""
    found = wanted.floor().clamp(1, most).long()
    while (missing := steps - int(found.sum())) != 0:
        room = found < most if missing > 0 else found > 1
        toward = (wanted - found) * (1 if missing > 0 else -1)
        order = torch.where(room, toward, -torch.inf).argsort(descending=True, stable=True)
        chosen = order[: min(abs(missing), int(room.sum()))]
        found[chosen] += 1 if missing > 0 else -1
    return [int(count) for count in found]
