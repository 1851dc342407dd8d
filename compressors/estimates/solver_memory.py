"""Peak memory of the solvers, on the device that computes.

The constants count tensors that exist at once in the code that they name; `DOUBLE` is the size of
their numbers. On a CPU they were compared with the storages of all live tensors, and on a GPU with
the peaks of the allocator (H200, SmolLM2-135M and the shapes of Llama-3-8B and 70B).
"""

from lrc.compressors.calibrate.segments import VALUE_BYTES
from lrc.compressors.compress.batches import batches
from lrc.compressors.estimates.workload import Workload, by_layer, numbers, sides
from lrc.compressors.methods.base import LOW_RANK_TYPES, FixedSizeMethod
from lrc.compressors.methods.fixed_size import Pruning
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.rate_distortion import curve_batches
from lrc.compressors.planning.tasks import LayerTask

DOUBLE = 8
CHOLESKY = 1
"""Matrices that a GPU needs for a Cholesky factorization, besides the matrix and its factor."""
SEARCH_MATRICES, SEARCH_SQUARES = 11, 1
"""Matrices of the size of the weight, and times both metrics, while a mask is searched: mask,
multipliers, error and the vectors of conjugate gradients in float32; both metrics and their
inverses in float32, which together take as much as the metrics in float64. So do, for a large
weight on a GPU, a copy in float32 and two in float16."""
STACKED_MATRICES, STACKED_SQUARES = 12, 2
"""The same for a stack of weights, whose metrics in float64 are kept."""
GPTQ_START_SQUARES = 3
"""Square matrices of `factor_inverse_hessian`: the shrunk moment, its permuted copy, the factor."""
DESCENT_MATRICES = {"cpu": 7.0, "cuda": 5.4}
"""Matrices of GPTQ after that: while codes are found, or the better rows are chosen. Coordinate
descent is in float32 on a GPU."""
STACK_MATRICES, STACK_SQUARES = 4.7, 4.5
"""Matrices and squares per weight of `gptq_together`, which keeps those of every weight next to the
stack: in float64 the weight, moment and inverse, and in float32 the moment of the descent."""


def largest_moments(work: Workload) -> int:
    """Return the statistics of the task that has most of them."""
    return max((moments(task) for task in work.tasks), default=0)


def largest_curve(work: Workload) -> int:
    """Return the memory of the curves of the tasks that are solved together."""
    found = [0]
    for task_batches in (curve_batches(tasks, work.device) for tasks in by_layer(work.pending)):
        found += [_curves(work, batch) for batch in task_batches]
    return max(found)


def largest_solution(work: Workload) -> int:
    """Return the memory of the final solution of the tasks that are solved together."""
    found = [0]
    alone = [task for task in work.tasks if task.compensate is None]
    for tasks in by_layer(alone):
        found += [_solutions(work, batch) for batch in batches(tasks, work.device)]
    return max(found)


def largest_refit(work: Workload) -> int:
    """Return the memory of a compensated task while it is fitted or solved."""
    return max((_refit(work, task) for task in work.compensated), default=0)


def sums_of_inputs(task: LayerTask) -> int:
    """Return the bytes of the moments that compensation measures for a task, see `PrefixMoments`.

    Two of its inputs, and the product with what is missing in the residual stream.
    """
    d_out, d_in = task.shape
    assert task.compensate is not None
    deficit = d_out * d_in if task.compensate.residual else 0
    return VALUE_BYTES * (2 * d_in**2 + deficit)


def moments(task: LayerTask) -> int:
    """Return the bytes of a task's statistics in float32."""
    return VALUE_BYTES * sum(_squares(task))


def _squares(task: LayerTask, *, fitted: bool = False) -> tuple[int, int]:
    """Return the numbers of both moments of a task; 0 for one that it does not need.

    A weight that has been fitted has the whole moment of its inputs.
    """
    d_out, d_in = task.stacked_shape
    whole = any(name.startswith("whole_") for name in task.statistics)
    near = d_in if whole or fitted else min(d_out, d_in)
    far = d_out if whole else min(d_out, d_in)
    return ("inputs" in task.statistics) * near**2, ("gradients" in task.statistics) * far**2


def _given(work: Workload, task: LayerTask) -> int:
    """Return the bytes of a weight and its statistics, as they are read."""
    return work.itemsize * numbers(task) + moments(task)


def _parts(work: Workload, task: LayerTask) -> dict[str, object]:
    """Return the methods of the components that a task may get."""
    allocation = None if task.allocation is None else work.plan.allocations[task.allocation]
    wanted = (task.config.types,) if allocation is None else allocation.types
    parts = METHODS[task.method].parts
    return {types: part for types, part in parts.items() if types in wanted}


def _curves(work: Workload, tasks: list[LayerTask]) -> int:
    """Return the memory of the curves of equal tasks, which are solved together."""
    task, found = tasks[0], 0
    short, _ = sides(task)
    for types, part in _parts(work, task).items():
        if isinstance(part, FixedSizeMethod):
            found = max(found, _fixed_size(work, task, part, len(tasks), _squares(task)))
        elif {types} & {*LOW_RANK_TYPES}:  # one after the other: the Gram matrix and its factors
            squares = 4 + (CHOLESKY if work.kind == "cuda" else 0)
            found = max(found, DOUBLE * (numbers(task) + squares * short**2))
    return len(tasks) * _given(work, task) + found


def _fixed_size(
    work: Workload,
    task: LayerTask,
    part: FixedSizeMethod,
    count: int,
    squares: tuple[int, int],
) -> int:
    """Return the memory of a fixed-size method for `count` equal tasks, see `_squares`."""
    matrix, both = DOUBLE * numbers(task), DOUBLE * sum(squares)
    if not isinstance(part, Pruning):
        return 8 * matrix + 3 * both
    if count > 1:
        return count * (STACKED_MATRICES * matrix + STACKED_SQUARES * both)
    # Before the search: the metric, as it is and scaled, and the factor of the larger moment with
    # its inverse in float32, or the memory of the factorization.
    larger = DOUBLE * max(squares)
    factored = 2.0 if work.kind == "cuda" else 1.5
    start = round(2 * both + factored * larger + 2 * matrix)
    # After it, energies are in the metric in float64: its larger moment is being damped.
    end = round((SEARCH_SQUARES + 1) * both + larger + 5 * matrix)
    return max(start, end, SEARCH_MATRICES * matrix + SEARCH_SQUARES * both)


def _solutions(work: Workload, tasks: list[LayerTask]) -> int:
    """Return the memory of the final solutions of equal tasks, which are solved together."""
    task, square = tasks[0], DOUBLE * tasks[0].stacked_shape[1] ** 2
    if len(tasks) > 1:
        each = STACK_MATRICES * DOUBLE * numbers(task) + STACK_SQUARES * square
        return len(tasks) * (_given(work, task) + round(each))
    return _given(work, task) + _solution(work, task)


def _solution(work: Workload, task: LayerTask, *, fitted: bool = False) -> int:
    """Return the memory of one solution, besides the weight and its statistics as they are read.

    Of a weight that has been fitted, low-rank and quantization solvers need another copy of the
    moment of the inputs in float64, while that from which it was made remains.
    """
    short, _ = sides(task)
    matrix, square = DOUBLE * numbers(task), DOUBLE * task.stacked_shape[1] ** 2
    squares, found, copied = _squares(task, fitted=fitted), 0, square if fitted else 0
    for types, part in _parts(work, task).items():
        if isinstance(part, FixedSizeMethod):
            found = max(found, _fixed_size(work, task, part, 1, squares))
        elif {types} & {*LOW_RANK_TYPES}:  # the factors, those to store, and what they solve for
            both = DOUBLE * sum(squares)
            found = max(found, copied + 3 * matrix + both + 6 * DOUBLE * short**2)
    if task.quantize is not None:
        start = GPTQ_START_SQUARES + (CHOLESKY if work.kind == "cuda" else 0)
        after = round(DESCENT_MATRICES[work.kind] * matrix)
        found = max(found, copied + matrix + start * square, copied + after + square)
    return found


def _refit(work: Workload, task: LayerTask) -> int:
    """Return the memory of a compensated task, besides the layer that has its compressed weights.

    The fit factors the whole moment of its inputs in float64. The fitted weight, in float64, is
    compressed with this moment instead of that of the dense model.
    """
    matrix, square = DOUBLE * numbers(task), DOUBLE * task.shape[1] ** 2
    factored = 2 + (CHOLESKY if work.kind == "cuda" else 0)
    fitting = work.itemsize * numbers(task) + 2 * matrix + factored * square
    gradients = VALUE_BYTES * _squares(task)[1]
    solving = gradients + matrix + _solution(work, task, fitted=True)
    return sums_of_inputs(task) + max(fitting, solving)
