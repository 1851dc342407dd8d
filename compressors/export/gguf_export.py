"""Write a checkpoint as a GGUF file for llama.cpp."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    get_tensor_name_map,
)
from torch import Tensor

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.export.gguf_blocks import encode_floats
from lrc.compressors.export.gguf_families import Family, family_of
from lrc.compressors.export.gguf_metadata import (
    QUANTIZATION_VERSION,
    file_type,
    model_metadata,
)
from lrc.compressors.export.gguf_rope import rope
from lrc.compressors.export.gguf_tensors import GgufTensor, TensorPlanner, totals
from lrc.compressors.export.gguf_tokenizer import REMEDY, folder_tokenizer, gguf_tokenizer
from lrc.compressors.export.stored_weights import StoredWeights
from lrc.compressors.io.machine import OnStep
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers.model_shapes import SHAPES, tables_of
from lrc.configs.errors import ExportError
from lrc.configs.size import size_texts

MLP = ("gate_proj", "up_proj", "down_proj")
MAX_UINT32 = 2**32 - 1
TYPES = {
    bool: GGUFValueType.BOOL,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


@dataclass(frozen=True)
class GgufOptions:
    """How to write weights that GGUF cannot store exactly, and where the tokenizer is."""

    matrices: str | None = None
    """Type of matrices without an exact block type."""
    embeddings: str | None = None
    """The same for embedding and head."""
    tokenizer: Path | None = None
    """Folder or GGUF file; by default that of the checkpoint, or of its source if that is GGUF."""


class GgufExport:
    """An export that has been checked, so that writing it can only fail for lack of space.

    Parameters
    ----------
    weights : StoredWeights
    options : GgufOptions

    Raises
    ------
    ExportError
        If GGUF cannot express the model, or llama.cpp would compute something else.
    CheckpointError
        If the recipe in the checkpoint, which names the source, has changed.
    """

    def __init__(self, weights: StoredWeights, options: GgufOptions) -> None:
        self._weights = weights
        model, config = weights.architecture.model, weights.architecture.model.config
        family = family_of(config)
        self._widths = _mlp_widths(weights, family)
        arch = family.arch_of(self._widths)
        self._arch: str = MODEL_ARCH_NAMES[arch]
        names = get_tensor_name_map(arch, config.num_hidden_layers)
        found = rope(model, family)
        planner = TensorPlanner(weights, family, names, options.matrices, options.embeddings)
        self.tensors = planner.plan()
        self._factors: Tensor | None = found.factors
        rows = model.get_input_embeddings().weight.shape[0]
        keys = model_metadata(config, family, self._widths, rows) | found.keys
        self.metadata: dict[str, Any] = {
            "general.type": "model",
            "general.file_type": file_type(t.kind for t in self.tensors if t.role != "vectors"),
            "general.quantization_version": QUANTIZATION_VERSION,
            **_tokenizer(weights, options.tokenizer, rows),
            **{f"{self._arch}.{key}": value for key, value in keys.items()},
        }
        self.notes = _notes(self.tensors, config, keys["context_length"])

    def write(self, path: Path, on_step: OnStep) -> None:
        """Write the file, with one matrix in memory at a time."""
        logging.getLogger("gguf").setLevel(logging.ERROR)
        writer = GGUFWriter(path, self._arch)
        self.metadata.setdefault("general.name", _name(self._weights.source.folder))
        for key, value in self.metadata.items():
            writer.add_key_value(key, value, _value_type(value))
        tensors = self._all_tensors()
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                tensor.nbytes,
                raw_dtype=tensor.kind,
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, tensor in enumerate(tensors):
                on_step("export", done, len(tensors))
                writer.write_tensor_data(tensor.encode())
            on_step("export", len(tensors), len(tensors))
        finally:
            writer.close()

    def to_json(self) -> dict[str, Any]:
        """Return what the file contains, as JSON values."""
        return {
            "architecture": self._arch,
            "types": totals(self._all_tensors()),
            "roles": dict(Counter(tensor.role for tensor in self.tensors)),
            "notes": self.notes,
        }

    def _all_tensors(self) -> list[GgufTensor]:
        """Return the tensors of the model and the table of rotary frequencies."""
        if (factors := self._factors) is None:
            return self.tensors
        kind = GGMLQuantizationType.F32
        table = GgufTensor(
            "rope_freqs.weight",
            (),
            [len(factors)],
            kind,
            "vectors",
            lambda: encode_floats(kind, factors),
        )
        return [table, *self.tensors]


def _name(folder: Path) -> str:
    """Return the name of a model: that of its folder, or of the run that wrote it there."""
    path = folder.resolve()
    return path.parent.name if path.name == "checkpoint" else path.name


def _value_type(value: Any) -> GGUFValueType:
    """Return the type that a value of the metadata is written in."""
    if type(value) is int:
        large = GGUFValueType.UINT64 if value > MAX_UINT32 else GGUFValueType.UINT32
        return GGUFValueType.INT32 if value < 0 else large
    return TYPES[type(value)]


def _mlp_widths(weights: StoredWeights, family: Family) -> list[int]:
    """Return the MLP width of every layer; only these may differ from the config."""
    table = tables_of(weights.source.config).get(SHAPES, {})
    other = [name for name in table if name.split(".")[-1] not in MLP]
    shapes = weights.shapes
    names = weights.architecture.layer_names
    if family.experts:
        widths = [weights.architecture.model.config.intermediate_size] * len(names)
    else:
        widths = [shapes[f"{name}.mlp.up_proj.weight"][0] for name in names]
    uneven = len({*widths}) > 1 and family.layer_widths is None
    if other or uneven:
        what = shortened(other or list(table), ", ")
        raise ExportError(
            f"{what}: {family.arch.name.lower()} models in GGUF must have the same shapes in all "
            "layers, got others that a slice has chosen; run `lrc export --format dense`, which "
            "pads them with zeros, and export that folder, or slice with `uniform: true`"
        )
    return widths


def _tokenizer(weights: StoredWeights, given: Path | None, vocabulary: int) -> dict[str, Any]:
    """Return the metadata of the tokenizer."""
    folder, trusted = weights.source.folder, weights.source.spec.trust_remote_code
    path = given or _source_gguf(weights) or folder
    if path.is_dir():
        return folder_tokenizer(path, vocabulary, trust_remote_code=trusted)
    return gguf_tokenizer(path, vocabulary)


def _source_gguf(weights: StoredWeights) -> Path | None:
    """Return the GGUF file that a checkpoint was made from; None if it was none.

    transformers converts the tokenizers of GGUF files imperfectly, so that the one in the folder
    can differ from the original.
    """
    folder, manifest = weights.source.folder, weights.contents.manifest
    if manifest is None or layout.RECIPE not in manifest.hashes:
        return None
    manifest.check_hashes([layout.RECIPE])
    recipe = folder / layout.RECIPE
    model = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("model")
    spec = {"path": model} if isinstance(model, str) else model
    name = str(spec.get("file") or spec["path"])
    if spec.get("tokenizer") or not name.endswith(".gguf"):
        return None
    path = Path(spec["path"]).expanduser()
    path = path / spec["file"] if spec.get("file") else path
    if not path.is_file():
        raise ExportError(
            f"{folder}: was made from {path}, which is not there, and the tokenizer that "
            f"transformers has made from it may differ; {REMEDY}, or --tokenizer {folder} to use "
            "it nevertheless"
        )
    return path


def _sizes(tensors: Sequence[GgufTensor]) -> list[str]:
    """Return the sizes of tensors in GGUF and in the checkpoint."""
    written = sum(tensor.nbytes for tensor in tensors)
    return size_texts(written, sum(tensor.stored_bytes for tensor in tensors))


def _notes(tensors: list[GgufTensor], config: Any, context: int) -> list[str]:
    """Return what the user should know about the result."""
    notes = []
    products = [tensor for tensor in tensors if tensor.role == "products"]
    if products:
        size, stored = _sizes(products)
        notes.append(
            f"matrices stored as dense products: {len(products)}, {size}, against "
            f"{stored} in the checkpoint"
        )
    larger = [
        tensor
        for tensor in tensors
        if tensor.role == "integers" and tensor.nbytes > 1.02 * tensor.stored_bytes
    ]
    if larger:
        size, stored = _sizes(larger)
        notes.append(
            f"matrices of integers that need more space in GGUF: {len(larger)}, {size}, "
            f"against {stored} in the checkpoint; int4-g32, int5-g32 and int8-g32 take the "
            "same space in both"
        )
    if any(tensor.kind.name in ("Q4_1", "Q5_1") for tensor in tensors):
        notes.append("minimums of asymmetric schemes are rounded to float16")
    if context < config.max_position_embeddings:
        notes.append(
            f"the context is limited to {context} tokens, the attention window of the model: "
            "llama.cpp would attend to all tokens of a longer text"
        )
    return notes
