"""Decide the name and type of every tensor of a GGUF file, before anything is written."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, TensorNameMap
from torch import Tensor

from lrc.compressors.export.gguf_blocks import (
    encode_floats,
    encode_integers,
    inexact_scales,
    kind_of,
)
from lrc.compressors.export.gguf_families import ALTERNATIVE, Family
from lrc.compressors.export.stored_weights import Integers, StoredWeights
from lrc.compressors.io.finite import all_finite
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers.gguf_types import BLOCK, BlockType, block_type
from lrc.configs.errors import ExportError
from lrc.configs.export_types import FLOAT_TYPES, GGUF_TYPES
from lrc.configs.size import size_texts

ROLES = ("integers", "weights", "products", "vectors")
"""How a tensor relates to the checkpoint: the stored codes as blocks, a weight of the source, the
dense product of a compressed weight, or a norm or bias."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, and how to make its data."""

    name: str
    sources: tuple[str, ...]
    """Names in the module tree: one, or those of all experts of a layer."""
    shape: list[int]
    kind: GGMLQuantizationType
    role: str
    """One of `ROLES`."""
    encode: Callable[[], np.ndarray]
    stored_bytes: float = 0.0
    """Size of the sources in the checkpoint, as far as the tensor contains them."""

    @property
    def nbytes(self) -> int:
        """Size in the file, without padding."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        size: int = prod(self.shape) // block * block_bytes
        return size


@dataclass(frozen=True)
class Origin:
    """Where the numbers of a tensor come from."""

    name: str
    """In the module tree; of experts, a name such as ``experts.gate_proj.weight``."""
    members: tuple[str, ...]
    """Names of the weights or biases, of which experts have one each."""
    shape: list[int]
    """[rows, columns] or [rows]; of experts [n_experts, rows, columns]."""
    rows: slice | None = None
    """Rows of every member that belong to the tensor; None for all."""

    @property
    def of_experts(self) -> bool:
        """Whether the matrices of all experts of a layer are stacked."""
        return len(self.shape) == 3


@dataclass
class TensorPlanner:
    """Plans the tensors of a model.

    Parameters
    ----------
    weights : StoredWeights
    family : Family
    names : TensorNameMap
    matrices, embeddings : str, optional
        Of `GGUF_TYPES`: for matrices without an exact block type, and for embedding and head among
        them. By default source weights keep their type, and other matrices are refused.
    """

    weights: StoredWeights
    family: Family
    names: TensorNameMap
    matrices: str | None = None
    embeddings: str | None = None
    _refused: dict[str, dict[str, None]] = field(default_factory=dict)

    def plan(self) -> list[GgufTensor]:
        """Return all tensors, in the order of the model.

        Raises
        ------
        ExportError
            Naming all weights that cannot be stored, with the reasons.
        """
        model = self.weights.architecture.model
        ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        self._ends = {f"{n}.weight" for n, m in model.named_modules() if id(m) in ends}
        found = [self._tensor(origin) for origin in self._origins()]
        if self._refused:
            raise ExportError("\n".join(self._sentence(reason) for reason in self._refused))
        return [tensor for tensor in found if tensor is not None]

    def _origins(self) -> Iterator[Origin]:
        """Yield the origins of all tensors, in the order of the model."""
        shapes = self.weights.shapes
        fused = self.weights.architecture.fused_tensors()
        first = {members[0]: (name, members) for name, (_, members) in fused.items()}
        others = {member for _, members in fused.values() for member in members}
        for name, shape in shapes.items():
            if name in first:
                yield from expert_origins(*first[name], shape)
            elif name not in others:
                yield Origin(name, (name,), shape)

    def _tensor(self, origin: Origin) -> GgufTensor | None:
        name, shape = origin.name, origin.shape
        stored = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        module = name.removesuffix(".bias")
        if stored is None or (module != name and module.split(".")[-1] not in self.family.biases):
            arch = self.family.arch.name.lower()
            self._refuse([name], f"{arch} models in GGUF have no such tensor; {ALTERNATIVE}")
            return None

        def tensor(
            kind: GGMLQuantizationType, role: str, encode: Callable[[str], np.ndarray]
        ) -> GgufTensor:
            part = prod(shape) / sum(prod(self.weights.shapes[each]) for each in origin.members)
            size = part * sum(map(self.weights.stored_bytes, origin.members))
            data = partial(self._data, origin, encode)
            return GgufTensor(stored, origin.members, shape, kind, role, data, size)

        if len(shape) == 1:
            return tensor(GGMLQuantizationType.F32, "vectors", self._vector)
        exact = self._exact_of_all(origin.members)
        if isinstance(exact, BlockType):
            return tensor(kind_of(exact), "integers", partial(self._integers, found=exact))
        requested = self._requested(name)
        if requested is None:
            requested = self._default(origin.members, exact)
        if requested is None:
            return None
        if requested not in FLOAT_TYPES and shape[-1] % BLOCK:
            self._refuse(
                [name],
                f"rows of {shape[-1]} numbers are not a multiple of {BLOCK}, which {requested} "
                "needs; use --type bf16",
            )
        kind = GGMLQuantizationType[requested.upper()]
        role = "weights" if exact is None else "products"
        return tensor(kind, role, partial(self._matrix, kind=kind))

    def _exact_of_all(self, names: Sequence[str]) -> BlockType | str | None:
        """Return the one exact type of several weights, as `_exact` does, or why there is none."""
        found = [self._exact(name) for name in names]
        if all(each == found[0] for each in found):
            return found[0]
        reasons = [each for each in found if isinstance(each, str)]
        return next(iter(reasons), "the experts of a layer are stored in different types")

    def _exact(self, name: str) -> BlockType | str | None:
        """Return the exact block type of a weight, why there is none, or None if it is dense."""
        config = self.weights.config_of(name)
        if config is None:
            return None
        args = config.quantization
        if config.types != "dense" or args is None:
            return f"GGUF has no type for {config.types}"
        found = block_type(args, config.shape[1])
        if isinstance(found, str):
            return found
        return inexact_scales(self.weights.scale(name.removesuffix(".weight")), args) or found

    def _requested(self, name: str) -> str | None:
        return (self.embeddings if name in self._ends else None) or self.matrices

    def _default(self, names: Sequence[str], reason: str | None) -> str | None:
        """Return the type of a weight, or of all experts, for which none is requested."""
        if reason is not None:
            self._refuse(names, f"{reason}: PRODUCT")
            return None
        return {"float32": "f32", "float16": "f16"}.get(self.weights.source.spec.dtype, "bf16")

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        self._refused.setdefault(reason, {}).update(dict.fromkeys(names))

    def _sentence(self, reason: str) -> str:
        """Return what is wrong with several weights, and what storing their products costs."""
        names = [*self._refused[reason]]
        text, product, _ = reason.partition(": PRODUCT")
        if product:
            shapes = self.weights.shapes
            now = sum(map(self.weights.stored_bytes, names))
            then = sum(2 * prod(shapes[name]) for name in names)
            dense, stored = size_texts(then, now)
            whole_blocks = all(shapes[name][-1] % BLOCK == 0 for name in names)
            kinds = [k for k in GGUF_TYPES[1:] if whole_blocks or k in FLOAT_TYPES]
            *others, last = kinds
            options = "--embedding-type" if {*names} <= self._ends else "--type"
            text += (
                f"; {options} {', '.join(others)} or {last} stores the dense matrix instead: "
                f"{dense} in 16 bits, {stored} in the checkpoint"
            )
        return f"{shortened(names, ', ')}: {text}"

    # What is called when the file is written.

    def _data(self, origin: Origin, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        """Return the data of a tensor: rows of one weight, or of all experts as a stack."""
        if not origin.of_experts:
            return encode(origin.name)
        return np.stack([encode(name)[origin.rows or slice(None)] for name in origin.members])

    def _vector(self, name: str) -> np.ndarray:
        vector = self._permuted(name, self.weights.read(name)).float()
        if name.endswith("norm.weight"):
            vector = vector + self.family.norm_offset
        values: np.ndarray = vector.numpy()
        return values

    def _integers(self, name: str, found: BlockType) -> np.ndarray:
        codes, scale, zero = self.weights.integers(name.removesuffix(".weight"))
        moved = [None if t is None else self._permuted(name, t) for t in (codes, scale, zero)]
        return encode_integers(found, Integers(*moved))  # type: ignore[arg-type]

    def _matrix(self, name: str, kind: GGMLQuantizationType) -> np.ndarray:
        matrix = self._permuted(name, self.weights.read(name))
        if kind == GGMLQuantizationType.F16 and not all_finite(matrix.half()):
            raise ExportError(f"{name}: has numbers beyond the range of f16; use --type bf16")
        return encode_floats(kind, matrix)

    def _permuted(self, name: str, rows: Tensor) -> Tensor:
        """Move rows of q and k, and their scales and zero points, to where llama.cpp expects them.

        A head of transformers has the first numbers of all rotary pairs, then the second ones;
        that of llama.cpp has one pair after the other.
        """
        config: Any = self.weights.architecture.model.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if self.family.permuted else None
        if count is None:
            return rows
        moved: Tensor = rows.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        return moved


def expert_origins(name: str, members: Sequence[str], shape: Sequence[int]) -> list[Origin]:
    """Return the origins of the matrices of experts, of which llama.cpp has gate and up apart.

    Parameters
    ----------
    name : str
        Of the parameter that transformers has for all experts, such as ``experts.gate_up_proj``.
    members : sequence of str
        Names of the matrices of the experts.
    shape : sequence of int
        Of one of them. The first half of the rows of a ``gate_up_proj`` is the gate.
    """
    rows, columns = shape
    prefix, leaf = name.rpartition(".")[::2]
    if leaf != "gate_up_proj":
        whole = [len(members), rows, columns]
        return [Origin(f"{name}.weight", tuple(members), whole)]
    half = [len(members), rows // 2, columns]
    parts = {"gate_proj": slice(rows // 2), "up_proj": slice(rows // 2, None)}
    return [
        Origin(f"{prefix}.{part}.weight", tuple(members), half, where)
        for part, where in parts.items()
    ]


def totals(tensors: Sequence[GgufTensor]) -> dict[str, dict[str, int]]:
    """Return type -> number of tensors and bytes."""
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = found.setdefault(tensor.kind.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return found
