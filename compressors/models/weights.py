"""Read weights from safetensors, one tensor at a time, by the names of the module tree."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lrc.compressors.io.device_copies import to_device
from lrc.compressors.io.finite import all_finite
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.contents import read_contents
from lrc.compressors.models.expert_tensors import Piece
from lrc.compressors.models.read_ahead import DEVICE_TYPES, ReadAhead
from lrc.configs.errors import ModelError


def not_finite(name: str, dtype: torch.dtype) -> ModelError:
    """Return the error for a weight of the source with entries that are not finite."""
    return ModelError(
        f"model.path: {name} holds NaN or Inf; the source is damaged (or overflows {dtype}): copy "
        "or download it again, or try another model.dtype"
    )


class SkeletonFiller(ABC):
    """Gives values to modules of a skeleton, and takes them away again.

    Parameters
    ----------
    architecture : Architecture
        The skeleton; its parameters give names, shapes and dtypes.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._parameters = architecture.stored_parameters()
        self._ahead: tuple[tuple[str, str], ReadAhead] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    @abstractmethod
    def read(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        """Return the values of a parameter by its name in the module tree."""

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
        values = {}
        if self._ahead is not None and self._ahead[0] == (name, str(device)):
            values = self._ahead[1].take()
            self._ahead = None
        for full, owner, leaf in self._entries(name, skip):
            stored = self._architecture.tied.get(full, full)
            if stored in self._parameters:
                found = values.pop(stored, None)
                tensor = self.read(stored, device=device) if found is None else found
                tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            else:  # a buffer that is not stored has its value already
                tensor = getattr(owner, leaf).to(device)
            _set(owner, leaf, tensor)

    def read_ahead(self, name: str, *, device: str) -> None:
        """Start to read the module `name` for the next `fill_` of it, if the device is a GPU.

        One module is read ahead, in its stored precision. Without a name, one that was not used is
        forgotten.
        """
        key = (name, device)
        if self._ahead is not None and self._ahead[0] == key:
            return
        self._ahead = None
        if name and torch.device(device).type in DEVICE_TYPES:
            full_names = [full for full, _, _ in self._entries(name, ())]
            stored = {self._architecture.tied.get(full, full) for full in full_names}
            stored &= self._parameters.keys()
            self._ahead = key, ReadAhead(sorted(stored), partial(self.read, device=device), device)

    def empty_(self, name: str, *, skip: Collection[str] = ()) -> None:
        """Move the weights of the module `name` back to the meta device."""
        for full, owner, leaf in self._entries(name, skip):
            stored = self._architecture.tied.get(full, full)
            if stored in self._parameters:
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


class WeightReader(SkeletonFiller):
    """Reads the tensors of a model by their names in the module tree.

    Parameters
    ----------
    folder : Path
        Folder with ``*.safetensors``.
    architecture : Architecture
        The skeleton; its parameters give names, shapes and the precision to read in.

    Raises
    ------
    ModelError
        As `read_contents`.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.folder = folder
        contents = read_contents(folder, architecture)
        self._pieces = dict(contents.pieces)
        for name in self._parameters:
            header = contents.header_of(name)
            if header is not None and name not in self._pieces:
                self._pieces[name] = [Piece(header)]

    def read(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor at the precision of the reference model.

        Raises
        ------
        ModelError
            If a number in it is not finite, or the file is gone.
        """
        pieces, dtype = self._pieces[name], self._parameters[name].dtype
        try:
            parts = [to_device(piece.read(), device, dtype) for piece in pieces]
        except (SafetensorError, OSError) as error:
            path, reason = pieces[0].header.file, str(error).strip()[:200]
            raise ModelError(
                f"model.path: {path} can no longer be read ({reason}); put it back unchanged and "
                "run the same command again"
            ) from error
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise not_finite(name, self._parameters[name].dtype)
        return tensor


def _set(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
