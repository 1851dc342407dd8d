"""Energies of pruning a weight to several sizes; of a large weight, from a sample of its rows.

The energy of a size is that of a search for its mask. The masks of a large weight are searched at
its largest and its smallest size only, and those of every `ROW_STRIDE`-th row alone at all sizes.
An energy is that of the sample, multiplied by the ratio of the weight to the sample. The ratio is
interpolated between the two sizes: its logarithm is linear in the number of entries.

A ratio of the numbers of rows would give energies that are 30 % too high on average, and of some
matrices twice as much, because rows compensate for each other and a sample has fewer correlations.
The ratio is that of equal searches: one that jumps from the largest to the smallest size leaves
more error than one through all sizes, with pattern n:8 up to a quarter more.

Energies differ from those of searches of all rows by 2.2 % on average and 12 % at most; they are
0.8 % too high on average, and by kind of matrix between 1.0 % too low and 1.8 % too high. With
pattern n:8, they differ by 3.7 % on average and 16 % at most (SmolLM2-135M-Instruct, kfac with
12,288 tokens of C4; q, o, gate, up and down of layers 1, 12 and 28 at the eight sizes of an
allocation; with n:8, six of them at seven sizes). Not counted is q of layer 1, whose energies of
whole searches are 1.1 to 2.1 times those of `prune`, and which differ by up to 32 %. With moments
of 2,000 tokens, three of the matrices differ by up to 14 %.
"""

from collections.abc import Callable, Sequence
from math import log

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
MAX_DRIFT = 1.5
"""Largest factor between the ratios at both sizes; 1.43 is that of the matrices above. It is larger
if the sample is unlike the weight, such as one without the rows of the largest errors, and if there
are fewer tokens than channels. All rows are then searched at all sizes."""

_ROWS = slice(None, None, ROW_STRIDE)


def sampled_rows(d_out: int, d_in: int, sizes: int) -> int:
    """Return the number of rows in the sample of a weight for its curve; 0 if none is taken."""
    if d_out * d_in < SAMPLED_FROM or sizes <= 2:
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
        ends = _searched(search, W, metric, [sizes[0], sizes[-1]], rounds)
        search = search.of_rows(_ROWS)  # instead of the search of all rows, to save memory
        part, part_metric = W[..., _ROWS, :], lambda: metric().of_rows(_ROWS)
        counts = [max(1, size * rows // d_out) for size in sizes]  # with n:8 there is no remainder
        pair = _searched(search, part, part_metric, [counts[0], counts[-1]], rounds)
        sample = _searched(search, part, part_metric, counts, rounds)
        energies, representative = _scaled(sample, ends / pair, sizes)
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


def _scaled(sample: Tensor, ratios: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scale the energies of a sample [sizes, ...] by the ratios at both ends [2, ...].

    Also returns of which weights the sample is representative, see `MAX_DRIFT`.
    """
    first, last = ratios.log()
    places = (sizes[0] - sample.new_tensor(sizes)) / (sizes[0] - sizes[-1])  # 0 to 1
    places = places.view(-1, *[1] * first.ndim)
    # False if an energy is zero, and a ratio is not finite.
    representative = (last - first).abs() <= log(MAX_DRIFT)
    return sample * (first + places * (last - first)).exp(), representative
