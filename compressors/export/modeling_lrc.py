# SPDX-License-Identifier: Apache-2.0
# Version 1 of the runtime, for version 2 of the format.
"""Run a compressed language model with transformers and plain PyTorch.

This file belongs to a checkpoint that `lrc export --format remote-code` wrote. It needs no other
package and no compiled kernels::

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

A compressed weight is a sum of components, such as a low-rank product and a sparse matrix.
``quantization_config`` in config.json lists the components of every weight, and how the shapes,
biases and norms of the model differ from those of its architecture. The model is the class of
transformers with these modules replaced. Quantized, sparse and dictionary matrices are expanded for
every product: this saves memory, not time. With `import lrc` instead of `trust_remote_code=True`,
the same folder runs with the kernels of lrc.
"""

import copy
import re
import sys
from collections.abc import Iterable
from math import ceil, gcd, prod
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

FORMAT_VERSION = 2
BLOCK = "quantization_config"
KEY = "compressed_modules"
"""Attribute with the block while weights are loaded, so that no quantizer is looked for."""
KNOWN = {"quant_method", "format_version", "modules", "shapes", "biases", "norms"}
VALUES_GROUP = 128
"""Values per scale if the scheme states no group and the values are not arranged in rows."""
WORD, BYTE = 32, 8
Shape = tuple[int, int]


class Scheme(NamedTuple):
    """Integers of `bits` bits; every `group` numbers of a row share a scale, None for all."""

    bits: int
    group: int | None
    symmetric: bool

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Scheme | None":
        """Read the scheme of a component, written like ``int4-g64-asymmetric``; None for floats."""
        text = record.get("quantization")
        if text is None:
            return None
        found = re.fullmatch(r"int(\d)(?:-g(\d+))?(-asymmetric|-s256)?", text)
        if found is None:
            raise ValueError(f"unknown quantization {text!r}")
        bits, group, rest = found.groups()
        return cls(int(bits), int(group) if group else None, rest != "-asymmetric")


def unpack_integers(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes [rows, columns], int8, that are packed into int32 words [rows, words].

    Code i of a row takes bits ``i * bits`` and following, lowest bit first, and is stored as its
    distance from the smallest code.
    """
    rows, words = packed.shape
    as_bytes = packed.flatten().contiguous().view(torch.uint8).view(rows, 4 * words)
    width = bits // gcd(bits, BYTE)  # bytes that hold a whole number of codes
    groups = ceil(as_bytes.shape[1] / width)
    if missing := groups * width - as_bytes.shape[1]:
        as_bytes = nn.functional.pad(as_bytes, (0, missing))
    grouped = as_bytes.view(rows, groups, width)
    codes = []
    for first in range(0, BYTE * width, bits):  # a code starts in one byte and may end in the next
        place, shift = divmod(first, BYTE)
        code = grouped[:, :, place] >> shift if shift else grouped[:, :, place]
        if shift + bits > BYTE:
            code = code | (grouped[:, :, place + 1] << (BYTE - shift))  # the rest leaves the byte
        codes.append(code)
    stored = torch.stack(codes, dim=-1) if len(codes) > 1 else grouped
    if bits < BYTE:
        stored = stored & ((1 << bits) - 1)
    signed: Tensor = stored.flatten(1)[:, :columns] - (1 << (bits - 1))
    return signed.view(torch.int8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """Return the mask [rows, columns] that is stored with one bit per entry, lowest bit first."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[:, :, None] >> places) & 1).flatten(1)[:, :columns].bool()


class PackedMatrix(nn.Module):
    """A linear layer without bias whose matrix [rows, columns] is stored as integers."""

    def __init__(self, rows: int, columns: int, scheme: Scheme, like: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features, self.scheme = rows, columns, scheme
        groups = 1 if scheme.group is None else columns // scheme.group
        packed = like.new_empty(rows, ceil(columns * scheme.bits / WORD), dtype=torch.int32)
        self.register_buffer("weight_packed", packed)
        self.weight_scale = nn.Parameter(like.new_empty(rows, groups))
        self.register_buffer("weight_shape", like.new_empty(2, dtype=torch.int64))
        if not scheme.symmetric:
            zero = like.new_empty(ceil(rows * scheme.bits / WORD), groups, dtype=torch.int32)
            self.register_buffer("weight_zero_point", zero)

    @property
    def weight(self) -> Tensor:
        """The matrix [rows, columns], in the dtype of the scales."""
        return self.rows(None)

    def rows(self, ids: Tensor | None) -> Tensor:
        """Return the rows `ids` [n] of the matrix, or all."""
        packed, scale = self.get_buffer("weight_packed"), self.get_parameter("weight_scale")
        zero = None
        if not self.scheme.symmetric:
            stored = self.get_buffer("weight_zero_point").T
            zero = unpack_integers(stored, self.scheme.bits, self.out_features).T  # [rows, groups]
        if ids is not None:
            packed, zero = packed.index_select(0, ids), None if zero is None else zero[ids]
        scales = scale if ids is None else scale.index_select(0, ids)  # [rows, groups]
        codes = unpack_integers(packed, self.scheme.bits, self.in_features)
        grouped = codes.view(*scales.shape, -1)  # [rows, groups, group]
        if zero is not None:
            grouped = grouped.to(torch.int16) - zero.to(torch.int16)[:, :, None]
        return (grouped.to(scales.dtype) * scales[:, :, None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., columns] to [..., rows]; integer ids [...] to rows [..., columns]."""
        if x.is_floating_point():
            return nn.functional.linear(x, self.weight)
        return self.rows(x.flatten()).view(*x.shape, self.in_features)


def _factor(rows: int, columns: int, record: dict[str, Any], like: Tensor) -> Any:
    """Return an uninitialized matrix of a component as a linear layer."""
    scheme = Scheme.of(record)
    if scheme is not None:
        return PackedMatrix(rows, columns, scheme, like)
    return nn.Linear(columns, rows, bias=False, device=like.device, dtype=like.dtype)


class Dense(PackedMatrix):
    """A whole matrix of integers."""

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        scheme = Scheme.of(record)
        if scheme is None:
            raise ValueError("a dense component must have a quantization")
        super().__init__(*shape, scheme, like)


class SharedFactor(nn.Module):
    """A component whose first factor ``a`` can be that of `owner`, a component of another layer."""

    owner: Any = None

    @property
    def first(self) -> Any:
        """The module of the first factor."""
        return (self if self.owner is None else self.owner).get_submodule("a")

    def multiply_first(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., d_in] by the first factor, which may be on another device."""
        device = next(self.first.parameters()).device
        p: Tensor = self.first(x if device.type == "meta" else x.to(device))
        return p.to(x.device)


class LowRank(SharedFactor):
    """The product of ``b`` [d_out, rank] and ``a`` [rank, d_in]."""

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        super().__init__()
        (d_out, d_in), rank = shape, record["rank"]
        if "shares" not in record:
            self.a = _factor(rank, d_in, record, like)
        self.b = _factor(d_out, rank, record, like)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = self.b(self.multiply_first(x))
        return y


class PivotedLowRank(nn.Module):
    """Pivot rows ``a`` of a matrix, and the other rows as combinations ``c @ a`` of these.

    Row j of the matrix is row ``order[j]`` of ``cat([a, c @ a])``.
    """

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        super().__init__()
        (d_out, d_in), rank = shape, record["rank"]
        self.a = _factor(rank, d_in, record, like)
        self.c = _factor(d_out - rank, rank, record, like) if rank < d_out else None
        dtype = torch.int16 if d_out < 2**15 else torch.int32
        self.register_buffer("order", like.new_empty(d_out, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        p: Tensor = self.a(x)
        rows = p if self.c is None else torch.cat([p, self.c(p)], dim=-1)
        return rows.index_select(-1, self.get_buffer("order").int())

    def is_consistent(self) -> bool:
        """Return whether the order is a permutation."""
        order = self.get_buffer("order").long()
        return torch.equal(order.sort().values, torch.arange(len(order), device=order.device))


class Masked(nn.Module):
    """Base class of components that store entries of a matrix [d_out, columns] and their places."""

    def __init__(
        self, mask: Shape, values: list[int], record: dict[str, Any], like: Tensor
    ) -> None:
        super().__init__()
        rows, self.columns = mask
        self.shape, self.scheme = values, Scheme.of(record)
        if self.scheme is None:
            self.values = nn.Parameter(like.new_empty(values))
        else:
            words = ceil(prod(values) * self.scheme.bits / WORD)
            scales = ceil(prod(values) / (self.scheme.group or VALUES_GROUP))
            self.register_buffer("values_packed", like.new_empty(1, words, dtype=torch.int32))
            self.values_scale = nn.Parameter(like.new_empty(scales))
        places = like.new_empty(rows, ceil(self.columns / 8), dtype=torch.uint8)
        self.register_buffer("mask", places)

    def stored_values(self) -> Tensor:
        """Return the values as floating-point numbers."""
        if self.scheme is None:
            return self.values
        scale, count = self.values_scale, prod(self.shape)
        codes = unpack_integers(self.get_buffer("values_packed"), self.scheme.bits, count)[0]
        group = self.scheme.group or VALUES_GROUP
        grouped = nn.functional.pad(codes, (0, len(scale) * group - count)).view(len(scale), -1)
        return (grouped.to(scale.dtype) * scale[:, None]).flatten()[:count].view(self.shape)

    def places(self) -> Tensor:
        """Return the mask [d_out, columns]."""
        return unpack_bits(self.get_buffer("mask"), self.columns)

    def entries(self) -> Tensor:
        """Return the matrix [d_out, columns] with its zeros."""
        values, places = self.stored_values(), self.places()
        return values.new_zeros(places.shape).masked_scatter(places, values)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        return nn.functional.linear(x, self.entries())

    def is_consistent(self) -> bool:
        """Return whether there are as many places as values."""
        return int(self.places().sum()) == prod(self.shape)


class Sparse(Masked):
    """Entries at the places of a mask, row by row."""

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        super().__init__(shape, [record["nonzeros"]], record, like)


class SemiStructured(Masked):
    """`n` of every eight consecutive entries of a row."""

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        super().__init__(shape, [shape[0], shape[1] // 8, record["n"]], record, like)


class BlockSparse(Masked):
    """Groups of consecutive entries of a row that are stored or zero; a mask has a bit for each."""

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        scheme = Scheme.of(record)
        if scheme is None or scheme.group is None:
            raise ValueError("a block_sparse component must have groups, like int4-g16")
        mask = (shape[0], shape[1] // scheme.group)
        super().__init__(mask, [record["groups"], scheme.group], record, like)

    def entries(self) -> Tensor:
        """Return the matrix [d_out, d_in] with its zeros."""
        groups, places = self.stored_values(), self.places()
        whole = groups.new_zeros(*places.shape, groups.shape[1])
        return whole.masked_scatter(places[:, :, None], groups).flatten(1)

    def is_consistent(self) -> bool:
        """Return whether there are as many places as groups."""
        return int(self.places().sum()) == self.shape[0]


class Dictionary(Masked, SharedFactor):
    """The product of sparse coefficients [d_out, atoms] and atoms ``a`` [atoms, d_in].

    Every output has equally many coefficients, at the places of a mask or at a list of indices.
    """

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        (d_out, d_in), atoms, count = shape, record["atoms"], record["nonzeros"]
        super().__init__((d_out, atoms), [d_out, count], record, like)
        self.d_out, self.d_in = shape
        if "shares" not in record:
            self.a = _factor(atoms, d_in, record, like)
        if 8 * ceil(atoms / 8) > 16 * count and atoms <= 2**15:  # the smaller one is stored
            del self.mask
            self.register_buffer("index", like.new_empty(d_out, count, dtype=torch.int16))

    def places(self) -> Tensor:
        """Return the mask [d_out, atoms]."""
        if "mask" in self._buffers:
            return super().places()
        index = self.get_buffer("index").long()
        mask = torch.zeros(self.d_out, self.columns, dtype=torch.bool, device=index.device)
        return mask.scatter(1, index.clamp(0, self.columns - 1), True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out], with the whole matrix if that is less work."""
        atoms, tokens = self.columns, x.numel() // self.d_in
        through_atoms = tokens * atoms * (self.d_in + self.d_out)
        S = self.entries()  # [d_out, atoms]
        plain = type(self.first) in (nn.Linear, PackedMatrix)  # not an adapter
        if plain and through_atoms > (tokens + atoms) * self.d_in * self.d_out:
            return nn.functional.linear(x, S @ self.first.weight.to(S.device, S.dtype))
        return nn.functional.linear(self.multiply_first(x), S)


class TensorTrain(nn.Module):
    """A chain of cores [bond, outputs, inputs, bond], whose outputs and inputs are factored.

    Core k is stored as a matrix [outputs * bond after it, bond before it * inputs].
    """

    def __init__(self, shape: Shape, record: dict[str, Any], like: Tensor) -> None:
        super().__init__()
        self.d_out, self.d_in = shape
        sides = [tuple(map(int, side.split("x"))) for side in record["pattern"].split(",")]
        sizes = [m * n for m, n in zip(*sides, strict=True)]
        full = [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]
        bonds = [1, *(min(record["bond"], each) for each in full), 1]
        self.shapes = list(zip(bonds, *sides, bonds[1:], strict=False))
        for k, (a, m, n, b) in enumerate(self.shapes, start=1):
            self.add_module(f"core{k}", _factor(m * b, a * n, record, like))
        # Multiply-adds: of a token from the first core and from the last, and of the whole matrix.
        cores = list(enumerate(map(prod, self.shapes)))
        (outputs, inputs), work = sides, []
        for before, after in ((outputs, inputs), (inputs, outputs)):
            work.append(sum(prod(before[:k]) * prod(after[k + 1 :]) * core for k, core in cores))
        self.first, self.last = work
        self.whole = sum(prod(sizes[:k]) * core for k, core in cores[1:])

    def cores(self) -> list[Tensor]:
        """Return the cores [a, m, n, b]."""
        found = []
        for child, (a, m, n, b) in zip(self.children(), self.shapes, strict=True):
            weight: Any = child.weight
            found.append(weight.reshape(m, b, a, n).permute(2, 0, 3, 1))
        return found

    def matrix(self) -> Tensor:
        """Return the matrix [d_out, d_in]."""
        cores = self.cores()
        (_, rows, columns, b), *others = self.shapes
        found = cores[0].reshape(-1, b)  # [rows * columns, b]
        for core, (_, m, n, b) in zip(cores[1:], others, strict=True):
            found = found @ core.reshape(-1, m * n * b)
            found = found.view(rows, columns, m, n, b).transpose(1, 2).reshape(-1, b)
            rows, columns = rows * m, columns * n
        return found.view(rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out] with the fewest multiply-adds."""
        tokens, leading = x.numel() // self.d_in, x.shape[:-1]
        dense = self.whole + tokens * self.d_out * self.d_in
        plain = all(type(core) in (nn.Linear, PackedMatrix) for core in self.children())
        if plain and tokens * min(self.first, self.last) > dense:
            return nn.functional.linear(x, self.matrix())
        if plain and self.last < self.first:
            rows, right = tokens * self.d_in, 1
            for core, (a, m, n, b) in zip(self.cores()[::-1], self.shapes[::-1], strict=True):
                rows //= n
                p = x.reshape(rows, n * b, right).transpose(1, 2).flatten(0, 1)
                p = nn.functional.linear(p, core.reshape(a * m, n * b))  # [rows * right, a * m]
                x = p.view(rows, right, a * m).transpose(1, 2)
                right *= m
            return x.reshape(*leading, self.d_out)
        rows, left = tokens, self.d_in
        for child, (a, m, n, b) in zip(self.children(), self.shapes, strict=True):
            left //= n
            p = x.reshape(rows, a * n, left).transpose(1, 2).flatten(0, 1)
            p = child(p)  # [rows * left, m * b]
            x = p.view(rows, left, m, b).permute(0, 2, 3, 1)  # [rows, m, b, left]
            rows *= m
        return x.reshape(*leading, self.d_out)


COMPONENTS: dict[str, Any] = {
    "dense": Dense,
    "low_rank": LowRank,
    "pivoted_low_rank": PivotedLowRank,
    "sparse": Sparse,
    "semi_structured": SemiStructured,
    "block_sparse": BlockSparse,
    "dictionary": Dictionary,
    "tensor_train": TensorTrain,
}
"""Type of a component in config.json -> its module, a child of the layer with that name."""


class CompressedLinear(nn.Module):
    """A linear layer, or an embedding, whose weight [d_out, d_in] is a sum of components.

    ``weight`` is a sentinel of one byte: without this file, transformers stops at its shape instead
    of starting from random weights.
    """

    def __init__(self, record: dict[str, Any], dense: Any) -> None:
        super().__init__()
        shape: Shape = tuple(record["shape"])
        self.out_features, self.in_features = shape
        if tuple(dense.weight.shape) != shape:
            raise ValueError(f"must have the shape {list(dense.weight.shape)}, got {list(shape)}")
        like = dense.weight.detach()
        self._buffers["weight"] = like.new_zeros(1, dtype=torch.uint8)
        self.types = [component["type"] for component in record["components"]]
        for kind, component in zip(self.types, record["components"], strict=True):
            if kind not in COMPONENTS:
                raise ValueError(f"components must be {', '.join(COMPONENTS)}, got {kind!r}")
            self.add_module(kind, COMPONENTS[kind](shape, component, like))
        has_bias = getattr(dense, "bias", None) is not None or record.get("bias", False)
        self.bias = nn.Parameter(like.new_empty(self.out_features)) if has_bias else None

    @property
    def weight(self) -> Tensor:
        """The sentinel as int8: models that convert inputs to the dtype of a weight leave them."""
        stored: Any = self._buffers["weight"]
        view: Any = stored.view(torch.int8)
        view._is_hf_initialized = getattr(stored, "_is_hf_initialized", False)  # once it is loaded
        return view  # type: ignore[no-any-return]

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary, of an embedding."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Width of the model, of an embedding."""
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]; of an embedding, ids [...] to [..., d_in]."""
        y: Tensor = self._modules[self.types[0]](x)  # type: ignore[misc]
        for kind in self.types[1:]:
            y = y + self._modules[kind](x)  # type: ignore[misc]
        return y if self.bias is None else y + self.bias


class TiedHead(nn.Module):
    """Output head with the integers of the embedding, which stores them."""

    owner: CompressedLinear
    bias = None

    def __init__(self, owner: CompressedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = owner.in_features, owner.out_features
        object.__setattr__(self, "owner", owner)  # not a child, which would be stored twice

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_model] to [..., vocabulary]."""
        device = next(self.owner.parameters()).device
        logits: Tensor = self.owner(x if device.type == "meta" else x.to(device))
        return logits.to(x.device)


class UnitNorm(nn.Module):
    """RMS norm without weights, and the change of basis of a residual connection.

    With a shortcut F [k, rank], ``x @ F @ F.T`` is subtracted from the output of the linear layer
    that writes to the residual stream, because the next block uses another basis.
    """

    def __init__(self, width: int, eps: float, shortcut: Tensor | None) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        found = None if shortcut is None else nn.Parameter(shortcut, requires_grad=False)
        self.register_parameter("shortcut", found)
        self._difference: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / sqrt(|x|^2 / width + eps)``, computed in float32 at least."""
        F = self._parameters["shortcut"]
        if F is not None:
            self._difference = (x @ F) @ F.T
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        power = exact.square().sum(-1, keepdim=True) / self.width
        return (exact * torch.rsqrt(power + self.eps)).to(x.dtype)

    def add_shortcut(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        """Correct the output ``y`` of the writer, as a forward hook."""
        difference, self._difference = self._difference, None
        if difference is None:
            raise RuntimeError("a layer was called before the norm of its block")
        return y - difference.to(y.device).reshape(y.shape)


def _find(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"config.json: {BLOCK} names {name!r}, which {type(model).__name__} lacks; the file "
            "belongs to another model: download the checkpoint again"
        ) from None


def rebuild_(model: Any, block: dict[str, Any]) -> None:
    """Change a model without weights as the block in its config states.

    Raises
    ------
    ValueError
        If the block does not belong to the model, or another version wrote it.
    """
    version, unknown = block.get("format_version"), sorted(block.keys() - KNOWN)
    if version != FORMAT_VERSION or unknown:
        found = f"the key {unknown[0]!r}" if unknown else f"format_version {version!r}"
        raise ValueError(
            f"config.json: {BLOCK} must be of format_version {FORMAT_VERSION}, got {found}; use "
            f"the {__name__.rpartition('.')[2]}.py that was exported together with this checkpoint"
        )
    for name, shape in block.get("shapes", {}).items():
        module = _find(model, name)
        module.weight = nn.Parameter(module.weight.new_empty(*shape))
        if isinstance(module, nn.Embedding):
            module.embedding_dim = shape[1]
            continue
        module.out_features, module.in_features = shape
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.new_empty(shape[0]))
    for name in block.get("biases", []):
        module = _find(model, name)
        module.bias = nn.Parameter(module.weight.new_empty(module.out_features))
    _replace_layers(model, block["modules"])
    like = next(model.parameters())
    for name, entry in block.get("norms", {}).items():
        norm, width = _find(model, name), model.config.hidden_size
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        if not entry:
            model.set_submodule(name, UnitNorm(width, eps, None))
            continue
        writer = _find(model, entry["writer"])
        unit = UnitNorm(width, eps, like.new_empty(writer.out_features, entry["rank"]))
        model.set_submodule(name, unit)
        writer.register_forward_hook(unit.add_shortcut)


def _replace_layers(model: Any, records: dict[str, Any]) -> None:
    tied: dict[str, str] = model.all_tied_weights_keys
    for name, record in records.items():
        dense = _find(model, name)
        try:
            layer = CompressedLinear(record, dense)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"config.json: {BLOCK}.modules[{name!r}]: {error}") from error
        model.set_submodule(name, layer)
        # Some classes initialize the weights of layers from the module that has them.
        owner = model.get_submodule(name.rpartition(".")[0])
        if owner is not model and not owner._non_persistent_buffers_set:
            owner._is_hf_initialized = True
        for head in [head for head, kept in tied.items() if kept == f"{name}.weight"]:
            model.set_submodule(head.removesuffix(".weight"), TiedHead(layer))
            del tied[head]  # transformers would tie the parameters by name
    for name, record in records.items():
        for component in record["components"]:
            if "shares" in component:
                owner = _find(model, f"{component['shares']}.{component['type']}")
                object.__setattr__(_find(model, f"{name}.{component['type']}"), "owner", owner)


class CompressedModel:
    """What a class of transformers needs to build and load a compressed model; its first base."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        block = getattr(config, KEY, None) or getattr(config, BLOCK, None)
        if block:
            rebuild_(self, block)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Load a checkpoint, as the class of transformers does.

        Raises
        ------
        ValueError
            If tensors are missing, or there are others than config.json describes.
        """
        if not isinstance(config, transformers.PreTrainedConfig):
            folder = config or pretrained_model_name_or_path
            config = transformers.AutoConfig.from_pretrained(folder)
        config = copy.deepcopy(config)
        if BLOCK in vars(config):
            setattr(config, KEY, vars(config).pop(BLOCK))
        base: Any = super()
        model, info = base.from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=config,
            output_loading_info=True,
            **options,
        )
        kinds = {"missing_keys": "lack", "unexpected_keys": "have the unknown"}
        for kind, verb in kinds.items():
            if info[kind]:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the weights {verb} {_some(info[kind])}; the "
                    "files do not belong together: download the checkpoint again"
                )
        _check_values(model, pretrained_model_name_or_path)
        kept = {*(getattr(model, "_keep_in_fp32_modules", None) or [])}
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) and kept & {*name.split(".")}:
                tensors = [*module.parameters(), *module.buffers()]
                if model.dtype != torch.float32 and torch.float32 in {x.dtype for x in tensors}:
                    module.register_forward_pre_hook(_to_float32)
        if KEY in vars(model.config):
            setattr(model.config, BLOCK, vars(model.config).pop(KEY))
        return (model, info) if output_loading_info else model

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **options: Any
    ) -> Any:
        """Resize the vocabulary, as the class of transformers does.

        Raises
        ------
        ValueError
            If the embedding or the head is compressed.
        """
        model: Any = self
        base: Any = super()
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if not any(isinstance(end, CompressedLinear | TiedHead) for end in ends):
            return base.resize_token_embeddings(new_num_tokens, *args, **options)
        size = model.config.get_text_config().vocab_size
        if new_num_tokens in (None, size):
            return ends[0]
        raise ValueError(
            f"cannot resize the vocabulary from {size} to {new_num_tokens} tokens, because the "
            "embedding or the head is stored as integers; compress the model without these"
        )


def _to_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() for x in args)


def _check_values(model: nn.Module, folder: Any) -> None:
    """Compare masks and orders with what config.json states, except on disk."""
    damaged = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Masked | PivotedLowRank)
        and not any(tensor.is_meta for tensor in module.buffers())
        and not module.is_consistent()
    ]
    if damaged:
        raise ValueError(
            f"{folder}: the weights of {_some(damaged)} are damaged; download the checkpoint again"
        )


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def __getattr__(name: str) -> Any:
    """Make the class of compressed models for a class of transformers with the same name."""
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (CompressedModel, base), {"__module__": __name__})
    setattr(sys.modules[__name__], name, made)
    return made
