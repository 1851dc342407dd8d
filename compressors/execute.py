"""Carry out the decomposition stages of a plan: weights in, factors on disk, layer by layer."""

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby

import torch
from torch import Tensor

from lrc.compressors.decompose import METHODS, Factors, Statistics
from lrc.compressors.journal import Journal
from lrc.compressors.layers import FORMS
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.plan import Matrix, Plan
from lrc.compressors.progress import OnStep
from lrc.configs.recipe import Recipe


def decompose(
    plan: Plan,
    recipe: Recipe,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Matrix], Statistics],
    *,
    device: str,
    on_step: OnStep,
) -> Plan:
    """Factor every matrix of the plan and return the plan as it was executed.

    Parameters
    ----------
    statistics : callable
        Returns what calibration knows of a matrix.
    on_step : callable
        Told (stage, layers done, layers) after each layer; what it raises stops the work there.

    Returns
    -------
    Plan
        With loss, rank and fallback of every matrix. The factors are in the journal, at the
        precision of the reference model, under the names the checkpoint will give them.
    """
    layers = [(index, list(group)) for index, group in groupby(plan.matrices, lambda m: m.layer)]
    executed: list[Matrix] = []
    for done, (index, matrices) in enumerate(layers, start=1):
        file = factors_file(index)
        if not journal.has(file):
            tensors: dict[str, Tensor] = {}
            records = []
            for matrix in matrices:
                record, factors = _factor(matrix, recipe, reader, statistics, device)
                records.append(record)
                tensors |= factors
            # A safetensors file wants at least one tensor, and a layer may stay dense as a whole.
            journal.write_tensors(
                file,
                tensors or {"none": torch.zeros(1)},
                {"matrices": [asdict(r) for r in records]},
            )
        facts = journal.read_facts(file)
        executed += [Matrix(**m | {"shape": tuple(m["shape"])}) for m in facts["matrices"]]
        on_step("decompose", done, len(layers))
    return replace(plan, matrices=executed)


def factors_file(layer: int) -> str:
    """Return the journal's name for the factors of one decoder layer."""
    return f"factors/layer-{layer:04d}.safetensors"


def _factor(
    matrix: Matrix,
    recipe: Recipe,
    reader: WeightReader,
    statistics: Callable[[Matrix], Statistics],
    device: str,
) -> tuple[Matrix, dict[str, Tensor]]:
    if matrix.rank is None:
        return matrix, {}
    method = METHODS[matrix.method]
    options = recipe.stages[matrix.stage].decompose
    known = statistics(matrix) if method.needs_inputs else Statistics()
    if method.needs_inputs and known.inputs is None:
        note = "saw no calibration token; stays dense"
        return matrix.executed(rank=None, loss=None, fallback=note), {}
    known = known.to(device)
    W = reader.read(f"{matrix.name}.weight", device=device)
    arguments = {key: getattr(options, key) for key in method.options}
    factors = method.solve(W, known, **arguments).truncate(matrix.rank)
    stored = _stored(matrix, factors, W.dtype)
    if not all(bool(torch.isfinite(t).all()) for t in stored.values()):
        note = f"factors overflow {W.dtype}; stays dense"
        return matrix.executed(rank=None, loss=None, fallback=note), {}
    record = matrix.executed(rank=factors.rank, loss=factors.loss, fallback=factors.fallback)
    return record, stored


def _stored(matrix: Matrix, factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = FORMS[matrix.form].encode(factors.B, factors.A)
    return {
        f"{matrix.name}.{leaf}": t.to("cpu", dtype if t.is_floating_point() else t.dtype)
        for leaf, t in tensors.items()
    }
