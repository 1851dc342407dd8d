"""Seconds of the methods that are solved at given sizes."""

from lrc.compressors.estimates.machine_rates import MachineRates
from lrc.compressors.estimates.workload import Workload, by_layer, numbers
from lrc.compressors.methods.base import FixedSizeMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.rate_distortion import curve_batches, size_families
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask

OPERATIONS = 24
"""Operations of a mask search for each product with its metric, counted in `prune`."""
OPERATION_SECONDS = {"cpu": 0.0, "cuda": 1.5e-5}
"""Time to start one of them with its share of the Python code, which is all the time that a small
matrix takes on a GPU: from the searches for the masks of SmolLM2-135M (H200)."""


def curve_seconds(work: Workload, rates: MachineRates) -> float:
    """Return the seconds of the curves from which an allocator chooses; 0 if there are none."""
    started = 0.0  # equal tasks of a layer are searched together
    for tasks in by_layer(work.pending):
        for batch in curve_batches(tasks, work.device):
            started += _operations(batch[0], _task_flops(work.plan, batch[0])[0])
    return _seconds(work, rates, 0, started)


def solution_seconds(work: Workload, rates: MachineRates) -> float:
    """Return the seconds of the final solutions.

    Where an allocator has yet to choose, the most expensive components count.
    """
    started = sum(_operations(task, _task_flops(work.plan, task)[1]) for task in work.tasks)
    return _seconds(work, rates, 1, started)


def _seconds(work: Workload, rates: MachineRates, which: int, started: float) -> float:
    """Return the time to compute, or that to start the operations if it is longer.

    `which` is the index of what is computed in the result of `_task_flops`. Searches for masks take
    elementwise operations as well; other methods mostly compute products.
    """
    products = elementwise = 0.0
    for task in work.tasks:
        products += 2 * _task_flops(work.plan, task)[which]
        searches = _task_flops(work.plan, task, masks_only=True)[which]
        elementwise += _operations(task, searches) * numbers(task)
    computing = products / rates.products + elementwise / rates.elementwise
    return max(computing, OPERATION_SECONDS[work.kind] * started)


def _task_flops(plan: Plan, task: LayerTask, *, masks_only: bool = False) -> tuple[int, int]:
    """Return the multiply-adds of a task: for its curves, and for its final solution.

    With `masks_only`, those of components that have masks.
    """
    allocation = None if task.allocation is None else plan.allocations[task.allocation]
    wanted = (task.config.types,) if allocation is None else allocation.types
    curve = largest = 0
    for types, part in METHODS[task.method].parts.items():
        if types not in wanted or not isinstance(part, FixedSizeMethod):
            continue
        if masks_only and "sparse" not in types:
            continue
        options = part.select(task.options)
        families = size_families(task, types, allocation)
        if allocation is None:
            final = [sizes for _, found in families for sizes in found]
        else:
            looked_at = [sizes for _, found in families for sizes in found]
            curve += part.flops(*task.stacked_shape, looked_at, curve=True, **options)
            steps = SizeSteps(task, types, ratio=families[0][0].ratio)
            step = steps.within(task.bits / task.dense_bits, BITS)
            final = [steps.config(step).sizes] if step else []
        largest = max(largest, part.flops(*task.stacked_shape, final, curve=False, **options))
    return curve, largest


def _operations(task: LayerTask, flops: int) -> float:
    """Return the operations of a task, of which each product with the metric has some.

    Products of a sample of rows count in proportion: starting the operations of a matrix that is
    large enough to be sampled takes little of its time.
    """
    d_out, d_in = task.stacked_shape
    return OPERATIONS * flops / (d_out * d_in * (d_out + d_in))
