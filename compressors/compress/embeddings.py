"""Embedding and head as integers: rounded to the nearest, some rows at a time."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lrc.compressors.compress.layerwise import executed, factors_file
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import to_host
from lrc.compressors.layers import Scheme
from lrc.compressors.layers.packed import encode_matrix
from lrc.compressors.layers.parts import sentinel
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Matrix, Plan, record_of
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantized_matrix import Rounded
from lrc.compressors.solvers.round_to_nearest import rtn
from lrc.configs.errors import ModelError

NUMBERS = 2**24
"""Of a matrix that are rounded together, in float64."""


def round_outside(plan: Plan, reader: WeightReader, journal: Journal, *, device: str) -> Plan:
    """Round what the plan names outside the layers; the integers are in the journal.

    Raises
    ------
    ModelError
        If no scales of the file's precision can stand for a weight.
    """
    if not plan.outside:
        return plan
    layer = plan.outside[0].layer
    if not journal.has(factors_file(layer)):
        tensors: dict[str, Tensor] = {}
        records = []
        for matrix in plan.outside:
            record, of_it = _rounded(matrix, reader.read(f"{matrix.name}.weight"), device)
            records.append(record_of(record))
            tensors |= of_it
        journal.write_tensors(factors_file(layer), tensors, {"matrices": records})
    return replace(plan, outside=executed(journal, layer))


def _rounded(matrix: Matrix, W: Tensor, device: str) -> tuple[Matrix, dict[str, Tensor]]:
    """Return a matrix as it was rounded, and its tensors by their names in the file."""
    assert matrix.scheme is not None
    scheme = Scheme.read(matrix.scheme)
    lost = energy = 0.0
    parts: list[Rounded] = []
    try:
        for rows in _pieces(W):
            rows = rows.to(device)
            found = rtn(rows, scheme, dtype=W.dtype)
            lost += weighted_error(rows, found.weight())
            energy += weighted_error(rows, 0 * rows)
            zero = None if found.zero is None else to_host(found.zero)
            parts.append(
                replace(found, codes=to_host(found.codes), scale=to_host(found.scale), zero=zero)
            )
    except ScaleOverflow as error:
        raise ModelError(
            f"{matrix.name} {list(matrix.shape)}: cannot be rounded to {matrix.scheme}: {error}; "
            "take model.dtype: bfloat16, or leave it as it is"
        ) from error
    zeros = [p.zero for p in parts if p.zero is not None]
    tensors = encode_matrix(
        "weight",
        torch.cat([p.codes for p in parts]),
        torch.cat([p.scale for p in parts]),
        torch.cat(zeros) if zeros else None,
        scheme,
    )
    stored = {"weight": sentinel(tensors["weight_packed"]), **tensors}
    done = matrix.at({}, loss=min(lost / (energy or 1.0), 1.0))
    return done, {f"{matrix.name}.{leaf}": tensor for leaf, tensor in stored.items()}


def _pieces(W: Tensor) -> Iterator[Tensor]:
    """Cut a matrix into runs of rows."""
    yield from W.split(max(1, NUMBERS // W.shape[1]))
