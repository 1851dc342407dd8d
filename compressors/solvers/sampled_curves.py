"""Energies of pruning a weight to several sizes; of a large weight, from a sample of its rows.

The energy of a size is that of a search for its mask. The masks of a large weight are searched at
its largest, middle and smallest size only, and those of every `ROW_STRIDE`-th row alone at all
sizes. An energy is that of the sample, multiplied by the ratio of the weight to the sample. The
ratio is interpolated: its logarithm is a parabola through the three sizes.

A ratio of the numbers of rows would give energies that are 30 % too high on average, and of some
matrices twice as much, because rows compensate for each other and a sample has fewer correlations.
The ratio is that of equal searches: one that jumps between the three sizes leaves more error than
one through all sizes.

The accuracy was measured with small matrices, whose rows were sampled for that purpose: q, o, gate,
up and down of layers 1, 12 and 28 of SmolLM2-135M-Instruct, with kfac, 12,288 tokens of C4 and the
eight sizes of an allocation. Energies differ from those of searches of all rows by 1.7 % on
average; they are 0.8 % too high on average, and by kind of matrix 0.1 to 1.3 %. At most, they
differ by 8 %, and by 17 % for q of layer 1, whose energies of whole searches are 1.1 to 2.1 times
those of `prune`. With pattern n:8, six of the matrices differ by 2.4 % on average at seven sizes,
and by 19 % at most. In a model of random weights, whose energies fall by orders of magnitude, they
differ by up to 59 %, which is how much they change with 3 % of the size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrc.compressors.solvers.mask_search import CURVE_STEPS_IN_METRIC, MaskSearch, MaskState
from lrc.compressors.solvers.masks import Pattern
from lrc.compressors.solvers.metric import Metric

SAMPLED_FROM = 2**23
"""Numbers of a weight from which rows are sampled. On a GPU, searches of smaller weights take the
time to launch their kernels, which a sample does not reduce."""
ROW_STRIDE = 8
"""With every fourth or every second row, energies are hardly more accurate."""
MAX_SHIFT = 0.05
"""How far the logarithm of the ratio of the middle size may be from the line through the others.
It is expressed as the change of the size, in fractions of the weight, that changes the logarithm of
the energy as much. It is larger if the sample is unlike the weight, such as one without the rows of
the largest errors. All rows are then searched at all sizes."""
WHOLE_SIZES = 3
"""Number of sizes for which all rows are searched: the largest, the middle and the smallest one."""

_ROWS = slice(None, None, ROW_STRIDE)


def sampled_rows(d_out: int, d_in: int, sizes: int) -> int:
    """Return the number of rows in the sample of a weight for its curve; 0 if none is taken."""
    if d_out * d_in < SAMPLED_FROM or sizes <= WHOLE_SIZES:
        return 0
    return len(range(d_out)[_ROWS])


def curve_energies(
    W: Tensor,
    metric: Callable[[], Metric],
    nonzeros: Sequence[int],
    pattern: Pattern,
    rounds: int,
) -> Tensor:
    """Return the energies [sizes] of a weight, or [sizes, n] of a stack of them, in float64.

    Sizes are processed in descending order, each from the mask of the previous one.

    Parameters
    ----------
    W : Tensor, shape [..., d_out, d_in], float64
    metric : callable
        Makes the metric whenever it is needed: it may be the largest matrix, and searches only need
        copies in float32.
    nonzeros, pattern, rounds
        Those of `prune_curve`.
    """
    if not nonzeros:
        return W.new_zeros(0, *W.shape[:-2])
    sizes = sorted(set(nonzeros), reverse=True)
    d_out, d_in = W.shape[-2:]
    search = MaskSearch.of(W, metric(), pattern)
    rows = sampled_rows(d_out, d_in, len(sizes))
    if rows == 0:
        energies = _searched(search, W, metric, sizes, rounds)
    else:
        few = [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
        whole = _searched(search, W, metric, few, rounds)
        search = search.of_rows(_ROWS)  # instead of the search of all rows, to save memory
        part, part_metric = W[..., _ROWS, :], lambda: metric().of_rows(_ROWS)

        def sampled(sizes: Sequence[int]) -> Tensor:
            counts = [max(1, size * rows // d_out) for size in sizes]  # exact with n:8
            return _searched(search, part, part_metric, counts, rounds)

        ratios, representative = _interpolated(whole, sampled(few), few, sizes, d_out * d_in)
        energies = ratios * sampled(sizes)
        if not representative.all():
            del search
            search = MaskSearch.of(W, metric(), pattern)
            every = _searched(search, W, metric, sizes, rounds)
            energies = torch.where(representative, energies, every)
    return energies[[sizes.index(size) for size in nonzeros]]


def _searched(
    search: MaskSearch,
    W: Tensor,
    metric: Callable[[], Metric],
    sizes: Sequence[int],
    rounds: int,
) -> Tensor:
    """Search the masks of descending sizes and return the energies [sizes, ...]."""
    state, energies = search.dense(), []
    for size in sizes:
        state = search.best(state, size, rounds)
        energies.append(_energy(search, state, W, metric))
    return torch.stack(energies)


def _energy(
    search: MaskSearch, state: MaskState, W: Tensor, metric: Callable[[], Metric]
) -> Tensor:
    """Return the energy of the mask of a search, after further steps for its values."""
    error = search.unscaled(search.refined(state, CURVE_STEPS_IN_METRIC))
    E = torch.where(state.mask, error, W)
    del error
    return metric().energy(E)


def _interpolated(
    whole: Tensor, sampled: Tensor, few: Sequence[int], sizes: Sequence[int], numbers: int
) -> tuple[Tensor, Tensor]:
    """Interpolate the ratios of energies [3, ...] by a parabola through their logarithms.

    `few` are the three sizes of the energies, of a weight with so many numbers. Also returns for
    which weights the sample is representative, see `MAX_SHIFT`.
    """
    first, middle, last = (whole / sampled).log()
    width = few[0] - few[-1]
    at = whole.new_tensor([few[0] - size for size in sizes]) / width  # 0 to 1
    at = at.view(-1, *[1] * first.ndim)
    center = (few[0] - few[1]) / width
    bend = middle - torch.lerp(first, last, center)
    found = first + at * (last - first) + bend * at * (1 - at) / (center * (1 - center))
    slope = (whole[-1] / whole[0]).log() * numbers / width  # on average
    # Neither is finite if an energy is zero.
    return found.exp(), bend.isfinite() & (bend.abs() <= MAX_SHIFT * slope)
