"""Read weights from safetensors, one tensor at a time, by the names of the module tree."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lrc.compressors.io.shards import read_headers, shard_files
from lrc.compressors.models.architecture import Architecture
from lrc.configs.errors import ModelError


class WeightReader:
    """Reads the tensors of a model by their names in the module tree.

    Other names in a file are renamed as in transformers: a bare decoder lacks the prefix of the
    causal model (`layers.0...` for `model.layers.0...`), and some architectures were published
    under older names (GPT-NeoX: `embed_out` for `lm_head`).

    Parameters
    ----------
    folder : Path
        Folder with ``*.safetensors``.
    architecture : Architecture
        The skeleton; its parameters give names, shapes and the precision to read in.

    Raises
    ------
    ModelError
        An incomplete file, missing tensors or wrong shapes; all problems at once.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder = folder
        self._architecture = architecture
        try:
            headers = read_headers(shard_files(folder))
        except ValueError as error:
            raise ModelError(f"model.path: {error}; copy or download it again") from error
        self._parameters = architecture.stored_parameters()
        found = renamed(headers, architecture.model)
        self._keys: dict[str, tuple[str, Path]] = {}
        problems = []
        for name, parameter in self._parameters.items():
            # A tied tensor may have been saved under its other name only.
            names = [name, *(tied for tied, main in architecture.tied.items() if main == name)]
            key = next((found[n] for n in names if n in found), None)
            if key is None:
                problems.append(f"{name} is missing")
                continue
            if headers[key].shape != list(parameter.shape):
                problems.append(f"{name} is {headers[key].shape}, not {list(parameter.shape)}")
            self._keys[name] = key, headers[key].file
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise ModelError(
                f"model.path: the weights in {folder} do not fit config.json: "
                + "; ".join(problems[:5])
                + more
                + "; the folder may be incomplete, or its tensor names need a conversion that "
                "lrc does not know: load and save it once with transformers"
            )

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def read(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor at the precision of the reference model.

        Raises
        ------
        ModelError
            If a number in it is not finite, or the file is gone.
        """
        key, path = self._keys[name]
        # Opened each time and copied: an open mapping keeps all pages resident that were touched.
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                tensor = tensor.to(device, self._parameters[name].dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model.path: {path} can no longer be read ({str(error).strip()[:200]}); put it "
                "back unchanged and run the same command again, it continues"
            ) from error
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"model.path: {name} holds NaN or Inf; the source is damaged (or overflows "
                f"{self._parameters[name].dtype}): copy or download it again, or try another "
                "model.dtype"
            )
        return tensor

    def fill_(
        self,
        name: str,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        skip: Collection[str] = (),
    ) -> None:
        """Load the weights of the module `name` of the skeleton, on `device` in `dtype`.

        Modules in `skip` and their descendants are left unchanged.
        """
        for full, owner, leaf in self._entries(name, skip):
            stored = self._architecture.tied.get(full, full)
            if stored in self._keys:
                tensor = self.read(stored, device=device)
                tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            else:  # a buffer that is not stored has its value already
                tensor = getattr(owner, leaf).to(device)
            _set(owner, leaf, tensor)

    def empty_(self, name: str, *, skip: Collection[str] = ()) -> None:
        """Move the weights of the module `name` back to the meta device."""
        for full, owner, leaf in self._entries(name, skip):
            stored = self._architecture.tied.get(full, full)
            if stored in self._keys:
                dtype = self._parameters[stored].dtype
                empty = torch.empty_like(getattr(owner, leaf), dtype=dtype, device="meta")
                _set(owner, leaf, empty)

    def _entries(self, name: str, skip: Collection[str]) -> list[tuple[str, nn.Module, str]]:
        """Return (full name, owner, attribute) of every parameter and buffer below a module."""
        result = []
        module = self._architecture.model.get_submodule(name)
        for prefix, owner in module.named_modules(prefix=name):
            if any(prefix == other or prefix.startswith(f"{other}.") for other in skip):
                continue
            result += [
                (f"{prefix}.{leaf}" if prefix else leaf, owner, leaf)
                for leaf in [*owner._parameters, *owner._buffers]
                if getattr(owner, leaf) is not None
            ]
        return result


def _set(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def renamed(keys: Iterable[str], model: Any) -> dict[str, str]:
    """Return name in the module tree -> key in the file.

    Without keys whose tensors transformers would not only rename, but split or merge.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    tree, prefix = model.state_dict(), model.base_model_prefix
    result: dict[str, str] = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, prefix, tree)
        if converted is None:
            result[name] = key
    return result
