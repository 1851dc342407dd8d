"""Read a compressed checkpoint one decoder layer at a time."""

from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lrc.compressors.calibrate.layer_check import simulated_calls
from lrc.compressors.checkpoint.format import COPY_AGAIN
from lrc.compressors.checkpoint.lrc_config import LrcConfig
from lrc.compressors.checkpoint.plain import plain_name
from lrc.compressors.checkpoint.quantizer import LrcQuantizer, replace_layers
from lrc.compressors.checkpoint.reader import Contents, check_checkpoint, stored_dtype
from lrc.compressors.checkpoint.tensor_checks import check_values
from lrc.compressors.io.device_copies import to_device
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers.component import SharedFactorComponent
from lrc.compressors.layers.compressed_linear import sentinel
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.configuration import read_config
from lrc.compressors.models.contents import renamed
from lrc.compressors.models.expert_tensors import Piece, expert_pieces, own_conversions
from lrc.compressors.models.source import Source
from lrc.compressors.models.weights import SkeletonFiller
from lrc.compressors.streamed.streamed_model import ModelFiles
from lrc.configs.errors import CheckpointError
from lrc.configs.recipe import Model


class CheckpointFiller(SkeletonFiller):
    """Reads the tensors of a checkpoint of lrc by their names in the module tree.

    Masks, indices and scales are checked when they are loaded.

    Parameters
    ----------
    folder : Path
    contents : Contents
        Of the folder.
    architecture : Architecture
        With the compressed layers of the checkpoint.

    Raises
    ------
    CheckpointError
        If the checkpoint lacks tensors of the model.
    """

    def __init__(self, folder: Path, contents: Contents, architecture: Architecture) -> None:
        super().__init__(architecture)
        self._folder = folder
        model, headers = architecture.model, contents.headers
        names = renamed(headers, own_conversions(model), model)
        stored = {name: headers[key] for key, (name, _) in names.items()}
        for alias, name in architecture.tied.items():  # stored under either name
            if alias in stored:
                stored.setdefault(name, stored[alias])
        # Those of experts that are not compressed may be stored together.
        experts, _ = expert_pieces(stored, [], architecture)
        self._sentinels: Collection[str] = ()
        if not contents.needs_lrc:  # tensors of components have other names
            self._sentinels = {f"{name}.weight" for name in contents.modules}
            stored = {n: stored[k] for n in self._parameters if (k := plain_name(n)) in stored}
        self._pieces = {name: Piece(header) for name, header in stored.items()}
        for name, (piece, *_) in experts.items():
            self._pieces.setdefault(name, piece)
        modules = {module: name for name, module in model.named_modules()}
        self._shared = {
            name: modules[module.first]
            for module, name in modules.items()
            if isinstance(module, SharedFactorComponent) and module.owner is not None
        }
        found = {*self._pieces, *self._sentinels}
        if missing := [name for name in self._parameters if name not in found]:
            raise CheckpointError(
                f"{folder}: the weights lack {shortened(missing, ', ')}; {COPY_AGAIN}"
            )

    def read(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor as it is stored.

        Raises
        ------
        CheckpointError
            If the file is gone.
        """
        piece = self._pieces.get(name)
        if piece is None:
            return sentinel().to(device)
        try:
            return to_device(piece.read(), device)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{piece.header.file}: can no longer be read ({str(error).strip()[:200]});"
                f" {COPY_AGAIN}"
            ) from error

    def fill_(
        self,
        name: str,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        skip: Collection[str] = (),
    ) -> None:
        """Load the module `name`, and check all values that are in memory.

        Factors that other modules store, and that it shares, are loaded too.

        Raises
        ------
        CheckpointError
            As `check_values`.
        """
        for each in (name, *self._factors_elsewhere(name)):
            super().fill_(each, device=device, dtype=dtype, skip=skip)
        try:
            check_values(self._architecture.model)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {error}", code=error.code) from error

    def empty_(self, name: str, *, skip: Collection[str] = ()) -> None:
        """Move what `fill_` has loaded back to the meta device."""
        for each in (name, *self._factors_elsewhere(name)):
            super().empty_(each, skip=skip)

    def _factors_elsewhere(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        return [
            factor
            for component, factor in self._shared.items()
            if component.startswith(prefix) and not factor.startswith(prefix)
        ]


def open_checkpoint(
    folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> ModelFiles:
    """Compare a checkpoint that lrc wrote with its hashes, and build its skeleton.

    Parameters
    ----------
    folder : Path
    dtype : torch.dtype
        Precision to run in.
    trust_remote_code : bool
        Whether to run the Python code of the checkpoint, if it has any.

    Raises
    ------
    CheckpointError
        Missing, truncated or changed files, or a newer format.
    ModelError
        If the architecture is not supported.
    """
    contents = check_checkpoint(folder)
    stored: Any = str(stored_dtype(contents)).removeprefix("torch.")
    spec = Model(path=str(folder), dtype=stored, trust_remote_code=trust_remote_code)
    config = deepcopy(read_config(folder, spec, ours=True))
    block = vars(config).pop("quantization_config", None)
    architecture = build(Source(spec, folder, config))
    # Before layers are replaced, which are not simulated. The class of a layer stays the same.
    calls = simulated_calls(architecture)
    model = architecture.model
    if contents.needs_lrc:
        assert isinstance(block, dict)
        options = {key: value for key, value in block.items() if key != "quant_method"}
        LrcQuantizer(LrcConfig(**options)).rebuild_(model)
    else:
        replace_layers(model, contents.modules)
    # A head that is tied to a quantized embedding is no longer tied by name.
    architecture = replace(architecture, tied=dict(model.all_tied_weights_keys))
    filler = CheckpointFiller(folder, contents, architecture)
    return ModelFiles(architecture, filler, calls, dtype)
