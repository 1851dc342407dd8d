"""Where the tensors of single experts are in the files of a model.

Files have one tensor for all experts of a layer, like the classes of transformers, or one for each
matrix of each expert, as most models were published. transformers converts the latter while it
loads them; here the tensors of an expert are read without those of the others.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from lrc.compressors.io.shards import Header
from lrc.compressors.layers.experts import BIAS, MATRICES, FusedTensor, split_modules
from lrc.compressors.models.architecture import Architecture

FUSED = re.compile(rf"experts\.({'|'.join(MATRICES)})({BIAS})?$")
NUMBER = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or the part of it that belongs to one expert."""

    header: Header
    index: int | None = None
    """Position of the expert in the first dimension; None for the whole tensor."""
    transposed: bool = False

    @property
    def shape(self) -> list[int]:
        """Shape of the result of `read`."""
        shape = self.header.shape if self.index is None else self.header.shape[1:]
        return shape[::-1] if self.transposed else shape

    def read(self) -> Tensor:
        """Read it; nothing else of the file.

        Raises
        ------
        SafetensorError, OSError
        """
        # Opened each time: an open mapping keeps all pages resident that were touched.
        with safe_open(self.header.file, framework="pt") as file:
            if self.index is None:
                found: Tensor = file.get_tensor(self.header.name)
            else:
                found = file.get_slice(self.header.name)[self.index]
        return found.mT.contiguous() if self.transposed else found


def own_conversions(model: Any) -> list[WeightTransform]:
    """Return how transformers converts the checkpoints of a model, except its experts if split.

    A checkpoint with split experts has their names in the module tree, which the conversions of
    published models would take for their own.
    """
    found: list[WeightTransform] = get_model_conversion_mapping(model)
    return without_experts(found) if any(split_modules(model)) else found


def without_experts(conversions: Sequence[WeightTransform]) -> list[WeightTransform]:
    """Return the conversions without those that fuse experts."""
    return [
        each
        for each in conversions
        if not isinstance(each, WeightConverter)
        or not any(FUSED.search(pattern) for pattern in each.target_patterns)
    ]


def with_fused(
    architecture: Architecture, meta: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Replace the tensors of single experts by those that the model class has for all of them.

    Parameters
    ----------
    meta : mapping of str to Tensor
        Every tensor of a checkpoint, in order, on the meta device.
    read : callable
        Returns the tensor of a name.

    Returns
    -------
    dict of str to Tensor, callable
        The same for the other names.
    """
    fused = architecture.fused_tensors()
    whole = {part: name for name, (_, parts) in fused.items() for part in parts}
    found: dict[str, Tensor] = {}
    for part, like in meta.items():
        name = whole.get(part, part)
        if name in fused:
            like = torch.empty(fused[name][0].shape, dtype=like.dtype, device="meta")
        found[name] = like

    def read_fused(name: str) -> Tensor:
        if name not in fused:
            return read(name)
        tensor, parts = fused[name]
        return tensor.join([read(part) for part in parts])

    return found, read_fused


def as_header(pieces: Sequence[Piece]) -> Header:
    """Describe the concatenation of pieces like a tensor of a file."""
    shape = [sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:]]
    n_bytes = sum(
        piece.header.nbytes // (piece.header.shape[0] if piece.index is not None else 1)
        for piece in pieces
    )
    return replace(pieces[0].header, shape=shape, nbytes=n_bytes)


def expert_pieces(
    headers: Mapping[str, Header],
    conversions: Sequence[WeightTransform],
    architecture: Architecture,
) -> tuple[dict[str, list[Piece]], set[str]]:
    """Find the tensors of experts in files.

    Returns
    -------
    dict of str to list of Piece
        Name of a tensor of one expert -> what to concatenate along its first dimension. Tensors
        whose layout is not known are left out.
    set of str
        Keys of the headers that were used.
    """
    fused, model = architecture.fused_tensors(), architecture.model
    if not fused:
        return {}, set()
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    tree: dict[str, Any] = {**model.state_dict(), **dict.fromkeys(fused, True)}
    order = {p: n for c in converters for n, p in enumerate(c.source_patterns)}
    operations = {p: c.operations for c in converters for p in c.source_patterns}
    found: dict[str, dict[int, Piece]] = {}
    used: dict[str, set[str]] = {}
    for key, header in headers.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, tree)
        if name not in fused:
            continue
        tensor, parts = fused[name]
        how = _layout(operations[pattern] if pattern is not None else [], tensor, header)
        place = order[pattern] if pattern is not None else 0
        for part, piece in _pieces(key, header, parts, how).items():
            found.setdefault(part, {})[place] = piece
            used.setdefault(part, set()).add(key)
    pieces = {part: [by[n] for n in sorted(by)] for part, by in found.items()}
    return pieces, {key for keys in used.values() for key in keys}


def _layout(
    operations: Sequence[ConversionOps], tensor: FusedTensor, header: Header
) -> tuple[bool, bool] | None:
    """Return whether files have a tensor for each expert, and whether it is transposed."""
    kinds = [type(operation) for operation in operations]
    dims = [getattr(operation, "dim", None) for operation in operations]
    if not kinds:
        return False, tensor.transposed
    if kinds == [Transpose]:
        turned: Any = operations[0]
        if {turned.dim0 % 3, turned.dim1 % 3} != {1, 2}:
            return None
        as_is = turned.check_dims and header.shape == [*tensor.shape]
        return False, tensor.transposed == as_is
    if tensor.transposed or kinds[0] is not MergeModulelist or dims[0] != 0:
        return None
    if kinds[1:] and (kinds[1:] != [Concatenate] or dims[1] != 1):
        return None
    return True, False


def _pieces(
    key: str, header: Header, parts: Sequence[str], how: tuple[bool, bool] | None
) -> dict[str, Piece]:
    """Return the pieces in one stored tensor by the names of the tensors that they belong to."""
    if how is None:
        return {}
    separate, transposed = how
    if separate:
        number = int(NUMBER.findall(key)[-1])
        return {parts[number]: Piece(header)} if number < len(parts) else {}
    if header.shape[:1] != [len(parts)]:
        return {}
    return {part: Piece(header, expert, transposed) for expert, part in enumerate(parts)}
