"""Write a plain checkpoint of int8 weights so that inputs are rounded to 8 bits, too (W8A8)."""

from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.checkpoint.plain import SCALE, compressed_tensors_config
from lrc.compressors.checkpoint.writer import write_config, write_weights
from lrc.compressors.export.stored_weights import StoredWeights
from lrc.compressors.io.machine import OnStep
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.experts import ordinary_linears
from lrc.compressors.models.architecture import build
from lrc.compressors.models.expert_tensors import with_fused
from lrc.configs.errors import ExportError

FORMAT = "int-quantized"
INT8 = QuantizationArgs(8, None)
BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""Inputs: one scale per token, from its largest magnitude."""
NOTE = (
    "inputs of these layers are rounded to 8 bits, which changes the predictions: compare them "
    "with `lrc eval` before use"
)


def write_int_quantized(weights: StoredWeights, folder: Path, on_step: OnStep) -> list[str]:
    """Fill an empty folder with the same integers in the format ``int-quantized``.

    Returns
    -------
    list of str
        What the user should know about the result.

    Raises
    ------
    ExportError
        If the checkpoint is not plain, or has other integers than int8 with one scale per row.
    """
    _check(weights)
    config: Any = deepcopy(weights.source.config)
    del config.quantization_config
    full = build(replace(weights.source, config=config))
    parts: dict[str, Tensor] = {}
    for name, tensor in full.stored_parameters().items():
        compressed = weights.config_of(name) is not None
        dtype = torch.int8 if compressed else weights.dtype
        parts[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        if compressed:
            scale = name.removesuffix(".weight") + SCALE
            parts[scale] = torch.empty(len(tensor), 1, dtype=weights.dtype, device="meta")

    done, n_tensors = count(1), len(parts)

    def read(name: str) -> Tensor:
        on_step("export", next(done), n_tensors)
        if name.endswith(SCALE):
            return weights.scale(name.removesuffix(SCALE))
        if weights.config_of(name) is not None:
            return weights.integers(name.removesuffix(".weight")).codes
        return weights.read(name).to(weights.dtype)

    write_weights(folder, *with_fused(full, parts, read))
    block = compressed_tensors_config(weights.modules, ordinary_linears(full.model))
    block["format"] = FORMAT
    for group in block["config_groups"].values():
        group |= {"format": FORMAT, "input_activations": BY_TOKEN}
    write_config(folder, full.model, block, weights.source.spec.dtype)
    copy_companions(weights.source, folder)
    return [NOTE]


def _check(weights: StoredWeights) -> None:
    where = f"{weights.source.folder}: {FORMAT} is a format of plain checkpoints of int8"
    remedy = (
        "quantize all targeted matrices with bits: 8, without group_size, symmetric: false and "
        "embeddings"
    )
    if weights.contents.needs_lrc or not weights.modules:
        form = "the format of lrc" if weights.modules else "a dense model"
        raise ExportError(f"{where}, got {form}; {remedy}")
    other: dict[str, str] = {}
    for name, config in weights.modules.items():
        if config.quantization != INT8:
            other.setdefault(str(config.quantization), name)
    if other:
        found = shortened([f"{scheme} of {name}" for scheme, name in other.items()], ", ")
        raise ExportError(f"{where}, one scale per row, got {found}; {remedy}")
