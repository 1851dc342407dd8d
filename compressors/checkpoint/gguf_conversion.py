"""Convert a GGUF file to a folder of safetensors, one tensor at a time."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.utils import (
    get_gguf_conversion_mapping,
    is_gguf_arch_supported,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from lrc.compressors.checkpoint.writer import write_config, write_weights
from lrc.compressors.io.gguf_file import read_gguf
from lrc.compressors.io.shards import Header
from lrc.compressors.models.architecture import build
from lrc.compressors.models.configuration import first_line
from lrc.compressors.models.gguf_source import check_gguf
from lrc.compressors.models.source import Source
from lrc.configs.errors import LrcError, ModelError

Undo = Callable[[str, np.ndarray], Tensor]
"""Undoes what llama.cpp has done to the values of a tensor, given its name in the file."""


def convert_gguf(source: Source, folder: Path) -> None:
    """Dequantize a GGUF file into shards of safetensors at the recipe's precision.

    Memory holds one shard, and one tensor in float32. Names and values are changed as by
    `from_pretrained(gguf_file=...)`.

    Parameters
    ----------
    source : Source
        Of a GGUF file.
    folder : Path
        Is created if it does not exist.

    Raises
    ------
    ModelError
        If the file does not hold the whole model, or has a type that gguf cannot dequantize.
    """
    path = source.folder / str(source.gguf)
    architecture = build(source)
    contents, _ = check_gguf(path, architecture)
    parameters = architecture.stored_parameters()
    try:
        undo = _undo(read_gguf(path)[0]["general.architecture"], architecture.model)
        folder.mkdir(parents=True, exist_ok=True)

        def read(name: str) -> Tensor:
            header, parameter = contents.header_of(name), parameters[name]
            assert header is not None  # `check_gguf` has refused the file otherwise
            # Vectors and kernels may lack a dimension of size 1.
            return undo(header.name, _values(header)).to(parameter.dtype).view(parameter.shape)

        write_weights(folder, parameters, read)
    except LrcError:
        raise
    except Exception as error:  # transformers and gguf raise nearly anything
        raise ModelError(
            f"model.path: {path} could not be dequantized ({first_line(error)}); it may be "
            "truncated, or of an architecture that transformers does not read from GGUF"
        ) from error
    write_config(folder, architecture.model, {}, source.spec.dtype)
    generation = getattr(architecture.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _values(header: Header) -> np.ndarray:
    """Read a tensor in float32, in the order of torch.

    Not through a mapping of the file, whose pages would stay in memory.
    """
    kind = GGMLQuantizationType[header.dtype]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    stored = np.fromfile(header.file, np.uint8, header.nbytes, offset=header.offset)
    *rows, n = header.shape
    values: np.ndarray = dequantize(stored.reshape(*rows, n // block * block_bytes), kind)
    return values


def _undo(kind: str, model: Any) -> Undo:
    """Return the function for files of an architecture, by its name in GGUF."""
    if not is_gguf_arch_supported(kind):
        made_by: Any = TENSOR_PROCESSORS.get(kind, TensorProcessor)
        processor = made_by(model.config.to_dict())

        def process(name: str, values: np.ndarray) -> Tensor:
            processed = processor.process(weights=values, name=name, parsed_parameters={})
            return torch.from_numpy(np.ascontiguousarray(processed.weights))

        return process
    mapping = get_gguf_conversion_mapping(kind, deepcopy(model.config))
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]

    def convert(name: str, values: np.ndarray) -> Tensor:
        full, pattern = rename_source_key(name, renamings, converters)
        tensor = torch.from_numpy(values)
        for converter in converters:
            if pattern in converter.source_patterns:
                for operation in converter.operations:
                    result: Any = operation.convert(
                        {pattern: [tensor]},
                        source_patterns=converter.source_patterns,
                        target_patterns=converter.target_patterns,
                        full_layer_name=full,
                    )
                    (tensor,) = result.values()
        return tensor

    return convert
