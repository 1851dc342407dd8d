"""Add what larger budgets need to weights that are compressed for the smallest one.

With error compensation, each budget has its own targets: a layer is fitted to what the layers
before it produce at that budget. So weights are compressed for the smallest budget first. In a
second pass, at the largest budget, the difference between the target and the stored weight is
truncated.
"""

from dataclasses import replace

from lrc.compressors.compress.group import CompressedGroup, WeightGroup, joined
from lrc.compressors.compress.quantize_parts import nearest_parts
from lrc.compressors.io.machine import to_host
from lrc.compressors.methods.table import METHODS, LowRankMethod


def refine(group: WeightGroup, base: CompressedGroup) -> CompressedGroup:
    """Return a weight of the smallest budget with the refinement of its task.

    Parameters
    ----------
    group : WeightGroup
        With the target of the largest budget as its only weight, and its statistics.
    base : CompressedGroup
        The same task at the smallest budget. It is returned without a refinement if the task has
        none, or if it could not be stored as pivot rows.
    """
    task, result = group.task, base.result
    method = METHODS[task.method]
    planned = [component for component in task.config.components if component.ranks]
    first = task.config.at_budget(-1)
    if not planned or result.config.types != first.types or first.elastic:
        return base
    assert isinstance(method, LowRankMethod)
    (refinement,) = planned
    assert refinement.quantization is not None
    name, options = task.name, method.select(task.options)
    (V,), (statistics,) = group.weights, group.statistics
    missing = V.double() - base.weight(name).to(V.device).double()
    curve = method.solve(missing, statistics, **options)
    factors = curve.truncate(refinement.sizes["rank"])
    parts = nearest_parts(
        {"a.weight": factors.A, "b.weight": factors.B}, refinement.quantization, group.dtype
    )
    component = refinement.with_rank(factors.rank)
    config = replace(result.config, components=(*result.config.components, component))
    total = float(method.energies(V, statistics, **options).sum())
    found = replace(
        result,
        config=config,
        relative_error=min(curve.tail_energy(factors.rank) / (total or 1.0), 1.0),
        predicted_nats=method.predicted_increase(
            curve.tail_energy(factors.rank), statistics.n_tokens
        ),
        fallback=joined(result.fallback, factors.fallback),
    )
    tensors = {f"{name}.{component.type}.{leaf}": to_host(t) for leaf, t in parts.items()}
    return CompressedGroup(task, found, {**base.tensors, **tensors})
