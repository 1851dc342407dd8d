"""Write a checkpoint as an ordinary dense model."""

from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.checkpoint.gguf_conversion import convert_gguf
from lrc.compressors.checkpoint.model_tables import added_biases
from lrc.compressors.checkpoint.writer import write_config, write_weights
from lrc.compressors.export.stored_weights import StoredWeights
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers.model_shapes import tables_of
from lrc.compressors.layers.residual_basis import BIASES
from lrc.compressors.models.architecture import build
from lrc.compressors.models.expert_tensors import with_fused
from lrc.compressors.models.source import load_tokenizer, locate
from lrc.configs.recipe import Model

NEEDS_LRC = (
    "its layers have biases that the architecture lacks, which are listed in config.json: loading "
    "it needs `import lrc`"
)


def write_dense(weights: StoredWeights, folder: Path, on_step: OnStep) -> list[str]:
    """Fill an empty folder with the dense model, in the dtype of the checkpoint.

    Layers that a slice has narrowed beyond what config.json can express are padded with zeros,
    which does not change the output of the model.

    Returns
    -------
    list of str
        What the user should know about the result.
    """
    biases = [
        *tables_of(weights.source.config).get(BIASES, []),
        *added_biases(weights.architecture.model, weights.modules),
    ]
    block = quantization_config({}, {BIASES: biases} if biases else {})
    config: Any = deepcopy(weights.source.config)
    if block:
        config.quantization_config = block
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    full = build(replace(weights.source, config=config))
    parts = {
        name: torch.empty(tensor.shape, dtype=weights.dtype, device="meta")
        for name, tensor in full.stored_parameters().items()
    }

    done, n_tensors = count(1), len(parts)

    def read(name: str) -> Tensor:
        on_step("export", next(done), n_tensors)
        return _padded(weights.read(name).to(weights.dtype), list(parts[name].shape))

    write_weights(folder, *with_fused(full, parts, read))
    write_config(folder, full.model, block, weights.source.spec.dtype)
    copy_companions(weights.source, folder)
    return [NEEDS_LRC] if biases else []


def write_gguf_as_dense(path: Path, folder: Path) -> None:
    """Fill an empty folder with the model of a GGUF file, dequantized to bfloat16.

    Raises
    ------
    ModelError
        If the file is damaged, or of a type or architecture that cannot be converted.
    """
    source = locate(Model(path=str(path)))
    tokenizer = load_tokenizer(source)
    convert_gguf(source, folder)
    tokenizer.save_pretrained(folder)


def _padded(tensor: Tensor, shape: list[int]) -> Tensor:
    """Return a tensor with zeros added at the end of every dimension."""
    missing = [wanted - size for wanted, size in zip(shape, tensor.shape, strict=True)]
    return nn.functional.pad(tensor, [n for each in reversed(missing) for n in (0, each)])
