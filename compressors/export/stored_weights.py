"""Read the weights of a checkpoint, dense or as stored integers, one at a time."""

from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from lrc.compressors.checkpoint.format import EDITED
from lrc.compressors.checkpoint.parent_weights import refuse_without_embedding
from lrc.compressors.checkpoint.plain import plain_name
from lrc.compressors.checkpoint.reader import check_checkpoint, stored_dtype
from lrc.compressors.io.shards import Header
from lrc.compressors.layers import WeightConfig, reconstruct
from lrc.compressors.layers.packing import unpack_integers
from lrc.compressors.layers.residual_basis import NORMS
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.configuration import read_config
from lrc.compressors.models.contents import renamed
from lrc.compressors.models.expert_tensors import Piece, expert_pieces, own_conversions
from lrc.compressors.models.source import Source
from lrc.compressors.models.weights import WeightReader
from lrc.configs.errors import CheckpointError, ExportError
from lrc.configs.recipe import Model

DTYPES = get_args(Model.model_fields["dtype"].annotation)
"""Names of the dtypes that models may have."""


class Integers(NamedTuple):
    """A quantized matrix: its numbers are ``(codes - zero) * scale``."""

    codes: Tensor
    """[rows, columns], int8"""
    scale: Tensor
    """[rows, groups]"""
    zero: Tensor | None
    """[rows, groups], int8; None if the scheme is symmetric"""


class StoredWeights:
    """The weights of a checkpoint by their names in the module tree.

    Parameters
    ----------
    folder : Path
        A compressed checkpoint, or a folder that `save_pretrained` wrote.
    trust_remote_code : bool
        Whether to run the Python code of the checkpoint, if it has any.

    Attributes
    ----------
    modules : dict of str to WeightConfig
        Compressed layers.
    dtype : torch.dtype
        Of the checkpoint.
    shapes : dict of str to list of int
        Of every weight and bias; of tied parameters, only the stored one.

    Raises
    ------
    CheckpointError, ModelError
        If the folder is damaged, its parts contradict each other, or its architecture is not
        supported.
    ExportError
        If its model has no dense form, or another tool has compressed it.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.contents = check_checkpoint(folder)
        self.modules: dict[str, WeightConfig] = self.contents.modules
        block = self.contents.config.get("quantization_config") or {}
        refuse_without_embedding(block, folder)
        if NORMS in block:
            raise ExportError(
                f"{folder}: cannot be exported: with 'rotations: block' every block uses its own "
                "basis of the residual stream, which no other format can express; slice with "
                "'rotations: global' instead"
            )
        if block and not (self.contents.needs_lrc or self.modules):
            raise ExportError(
                f"{folder}: only checkpoints that lrc wrote, with their folder lrc/, and models "
                f"that are not compressed can be exported, got {block.get('quant_method')!r} "
                "without lrc/manifest.json; give the folder OUTPUT/checkpoint of a run"
            )
        self.dtype = stored_dtype(self.contents)
        name: Any = str(self.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ExportError(
                f"{folder / 'config.json'}: dtype must be {', '.join(DTYPES)}, got {name}; load "
                "and save the model with transformers in one of these"
            )
        spec = Model(path=str(folder), dtype=name, trust_remote_code=trust_remote_code)
        self.source = Source(spec, folder, read_config(folder, spec, ours=True))
        self.architecture: Architecture = build(self.source)
        self._check_modules()
        parameters = self.architecture.stored_parameters()
        biases = {f"{name}.bias": [c.shape[0]] for name, c in self.modules.items() if c.bias}
        self.shapes = {name: list(tensor.shape) for name, tensor in parameters.items()} | biases
        self._reader = None if self.modules else WeightReader(folder, self.architecture)
        self._headers = self._named_headers() if self.modules else {}
        self._fused_experts, _ = expert_pieces(self._headers, [], self.architecture)

    def _check_modules(self) -> None:
        """Compare the shapes of compressed weights with those of the architecture."""
        model = self.architecture.model
        weights = dict(model.named_parameters(remove_duplicate=False))
        for name, config in self.modules.items():
            weight = weights.get(f"{name}.weight")
            found = None if weight is None else list(weight.shape)
            if found != list(config.shape):
                raise CheckpointError(
                    f"{self.source.folder / 'config.json'}: quantization_config.modules[{name!r}]: "
                    f"must be a weight of the model, which has {found or 'none'} there, got "
                    f"{list(config.shape)}; {EDITED}",
                    code="invalid-config",
                )

    def config_of(self, name: str) -> WeightConfig | None:
        """Return how a weight is compressed; None if it is stored as it is."""
        module, _, leaf = name.rpartition(".")
        return self.modules.get(module) if leaf == "weight" else None

    def stored_bytes(self, name: str) -> float:
        """Return the size of a weight in the checkpoint."""
        bits = torch.finfo(self.dtype).bits
        config = self.config_of(name)
        return (prod(self.shapes[name]) * bits if config is None else config.stored_bits(bits)) / 8

    def read(self, name: str) -> Tensor:
        """Return a weight or bias; a compressed weight as the dense matrix, in float32."""
        if self._reader is not None:
            return self._reader.read(name)
        config = self.config_of(name)
        if config is None:
            return self._tensor(name).to(self.dtype)
        module, owner = name.rpartition(".")[0], config.shares
        shared = None if owner is None else partial(self._stored, owner)
        return reconstruct(config, partial(self._stored, module), shared)

    def scale(self, module: str) -> Tensor:
        """Return the scales [rows, groups] of a quantized matrix."""
        return self._stored(module, "dense.weight_scale")

    def integers(self, module: str) -> Integers:
        """Return the codes, scales and zero points of a quantized matrix."""
        config = self.modules[module]
        args, (rows, columns) = config.quantization, config.shape
        assert args is not None
        zero = None
        if not args.symmetric:
            packed = self._stored(module, "dense.weight_zero_point")
            zero = unpack_integers(packed.T.contiguous(), args.bits, rows).T
        codes = unpack_integers(self._stored(module, "dense.weight_packed"), args.bits, columns)
        return Integers(codes, self.scale(module), zero)

    def _named_headers(self) -> dict[str, Header]:
        model, headers = self.architecture.model, self.contents.headers
        named = renamed(headers, own_conversions(model), model)
        return {name: headers[key] for key, (name, _) in named.items()}

    def _stored(self, module: str, leaf: str) -> Tensor:
        name = f"{module}.{leaf}"
        return self._tensor(name if self.contents.needs_lrc else plain_name(name))

    def _tensor(self, name: str) -> Tensor:
        header = self._headers.get(name)
        if header is not None:
            piece = Piece(header)
        else:
            (piece,) = self._fused_experts[name]
        return piece.read().clone()  # an open mapping keeps all pages in memory that were touched
