"""Quantize embedding and head by rounding to nearest, some rows at a time."""

import torch
from torch import Tensor

from lrc.compressors.compress.layerwise import layer_file, read_results, write_results
from lrc.compressors.io.device_copies import to_host
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers.packing import encode_matrix
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerResult, LayerTask
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantized_matrix import NUMBERS, round_to_nearest
from lrc.configs.errors import ModelError


def quantize_embeddings(plan: Plan, reader: WeightReader, journal: Journal, *, device: str) -> Plan:
    """Quantize embedding and head as planned; the tensors are in the journal afterwards.

    Raises
    ------
    ModelError
        If the scales of a weight overflow the dtype of the file.
    """
    if not plan.embeddings:
        return plan
    layer = plan.embeddings[0].layer
    if not journal.has(layer_file(layer)):
        tensors: dict[str, Tensor] = {}
        results: dict[str, LayerResult] = {}
        for task in plan.embeddings:
            W = reader.read(f"{task.name}.weight")
            results[task.name], found = _quantized(task, W, device)
            tensors |= {f"{task.name}.dense.{leaf}": tensor for leaf, tensor in found.items()}
        write_results(journal, layer, results, tensors)
    return plan.with_results(read_results(journal, layer))


def _quantized(task: LayerTask, W: Tensor, device: str) -> tuple[LayerResult, dict[str, Tensor]]:
    """Return the result and the tensors of a matrix by their names within the component."""
    args = task.config.quantization
    assert args is not None
    error = total = 0.0
    parts: list[list[Tensor]] = []
    try:
        for rows in W.split(max(1, NUMBERS // W.shape[1])):
            rows = rows.to(device)
            found = round_to_nearest(rows, args, dtype=W.dtype)
            error += weighted_error(rows, found.weight())
            total += weighted_error(rows, 0 * rows)
            stored = (found.codes, found.scale, found.zero)
            parts.append([to_host(tensor) for tensor in stored if tensor is not None])
    except ScaleOverflow as overflow:
        raise ModelError(
            f"{task.name} {list(task.shape)}: cannot be quantized to {args}: {overflow}; use "
            "model.dtype: bfloat16, or leave it unquantized",
            code="scale-overflow",
        ) from overflow
    codes, scale, *zero = map(torch.cat, zip(*parts, strict=True))
    tensors = encode_matrix("weight", codes, scale, zero[0] if zero else None, args)
    return LayerResult(task.config, min(error / (total or 1.0), 1.0)), tensors
