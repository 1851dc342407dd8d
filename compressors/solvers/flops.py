"""Arithmetic of the methods that are solved at given sizes, for an estimate of time.

All functions count multiply-adds. The weight is [d_out, d_in].
"""

from math import prod

from lrc.compressors.solvers.chain_fit import CG_STEPS
from lrc.compressors.solvers.ksvd import POWER_STEPS
from lrc.compressors.solvers.mask_search import (
    CURVE_STEPS_IN_METRIC,
    OUTER_STEPS,
    STEPS,
    STEPS_IN_METRIC,
)
from lrc.compressors.solvers.pruning import CURVE_ROUNDS, ROUNDS
from lrc.compressors.solvers.sampled_curves import WHOLE_SIZES, sampled_rows
from lrc.compressors.solvers.sparse_plus_low_rank import START_STEPS, directions
from lrc.compressors.solvers.thresholding import CODE_STEPS, FINAL_ROUNDS, FINAL_STEPS, START_ROUNDS

# A multiplication of a matrix-vector product takes as long as this many of a matrix product: every
# entry of the matrix is read for it.
VECTOR = 16
# Products with both metrics, or equivalent, to whiten a weight and to measure errors.
METRICS = 5
# Multiply-adds of a product that takes as long as all eigenvectors of a matrix, over size cubed.
EIGENVECTORS = 40


def pruning_work(d_out: int, d_in: int, sizes: int, *, curve: bool) -> int:
    """Count second-order pruning to several sizes.

    There is one product ``G @ E @ H`` per step, and one per refit.
    """
    rounds = CURVE_ROUNDS if curve else ROUNDS
    last = CURVE_STEPS_IN_METRIC if curve else STEPS_IN_METRIC
    fits = 2 * (OUTER_STEPS + 2) + rounds * (STEPS + 2) + last + 1
    whole = d_out * d_in * (d_out + d_in)
    rows = sampled_rows(d_out, d_in, sizes) if curve else 0
    if rows == 0:
        return fits * sizes * whole
    # A few searches of all rows; those of the sample at all sizes, and again at the same few.
    sampled = (sizes + WHOLE_SIZES) * rows * d_in * (rows + d_in)
    return fits * (WHOLE_SIZES * whole + sampled)


def sum_work(d_out: int, d_in: int, *, rank: int, rounds: int, start: bool) -> int:
    """Count the search for a low-rank plus sparse weight; `start` adds that for a start."""
    metric = d_out * d_in * (d_out + d_in)
    wide = directions(rank, d_out, d_in)
    step = wide * (2 * d_in**2 + d_out**2 + 2 * d_out * d_in) + rank * d_out * d_in
    fits = rounds * (STEPS + 3) + start * (OUTER_STEPS + 3)
    steps = rounds + start * START_STEPS
    return fits * metric + steps * (step + EIGENVECTORS * wide**3)


def chain_work(d_out: int, d_in: int, *, cores: int, rounds: int, starts: int = 0) -> int:
    """Count the search for a chain of cores: products with the metric, and the eigenvectors.

    `starts` counts other chains whose errors are measured before any round.

    Products with the other cores are left out. They take less as long as the bond dimensions are
    below the sides of the matrix.
    """
    steps = rounds * (2 * (cores - 1) * (CG_STEPS + 2) + 1) + METRICS + starts
    return steps * d_out * d_in * (d_out + d_in) + EIGENVECTORS * min(d_out, d_in) ** 3


def dictionary_work(
    solver: str, d_out: int, d_in: int, *, atoms: int, nonzeros: int, rounds: int
) -> int:
    """Count a dictionary solver.

    Products with vectors count `VECTOR` times, and pursuit reads its table once per step.
    """
    ready = METRICS * d_out * d_in * (d_out + d_in)
    return ready + _rounds(solver, d_out, min(d_out, d_in), atoms, nonzeros, rounds)


def _rounds(solver: str, d_out: int, dim: int, atoms: int, nonzeros: int, rounds: int) -> int:
    fit = prod((dim, atoms, d_out))  # D @ S, or what it is compared with
    codes = prod((atoms, atoms, d_out))  # D^T D S
    if solver == "cospadi":
        sweep = VECTOR * 2 * (POWER_STEPS + 1) * fit
        return rounds * (sweep + VECTOR * codes * nonzeros * nonzeros // (2 * atoms) + 2 * fit)
    refit = codes + 2 * fit + atoms**2 * dim
    if solver == "rocket":
        return refit + fit
    orthogonal = 3 * fit + 2 * atoms**2 * dim + EIGENVECTORS * atoms**3
    if solver == "compot":
        return rounds * orthogonal + refit
    steps = rounds * (CODE_STEPS + 2) + FINAL_ROUNDS * (FINAL_STEPS + 1)
    each = refit + 2 * fit + atoms**2 * dim
    return START_ROUNDS * orthogonal + steps * codes + (rounds + FINAL_ROUNDS) * each
