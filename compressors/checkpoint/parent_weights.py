"""Embedding and output head that a drafter does not store, but reads from its parent.

``parent`` in the ``quantization_config`` has ``"tensors": {MODULE: TENSOR, ...}``, with the tensor
in the files of the parent that is the weight of a module of the drafter, ``"dtype"``, to which it
is converted, and ``"sha256"``, the hash of all of them after that. ``parent_model`` in
``config.json`` is the folder or Hub id of the parent; as an argument of `from_pretrained` it
replaces the stored one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrc.compressors.checkpoint.format import EDITED, PARENT
from lrc.compressors.io.shards import read_folder
from lrc.compressors.io.weight_hash import WeightHash
from lrc.compressors.models.source import locate
from lrc.configs.errors import CheckpointError, ExportError, ModelError, RecipeError
from lrc.configs.recipe import Model

PARENT_MODEL = "parent_model"
"""Key of config.json with the parent, an argument of `from_pretrained`."""
ANOTHER_PLACE = f"pass {PARENT_MODEL}=FOLDER to from_pretrained if it is elsewhere"


@dataclass(frozen=True)
class ParentWeights:
    """What a drafter reads from its parent."""

    tensors: dict[str, str]
    """Name of a module of the drafter -> name of a tensor in the files of the parent."""
    dtype: str
    """Of the tensors in the drafter, such as ``bfloat16``."""
    sha256: str
    """Of the tensors in that dtype, see `read_parent`."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the config."""
        return asdict(self)

    @classmethod
    def parse(cls, table: Any, where: str) -> "ParentWeights | None":
        """Read an entry of a config; None if there is none.

        Raises
        ------
        CheckpointError
            If this version cannot have written it.
        """
        if table is None:
            return None
        try:
            found = cls(**table)
            names = [*found.tensors, *found.tensors.values(), found.dtype, found.sha256]
            valid = bool(found.tensors) and all(isinstance(name, str) for name in names)
            valid = valid and isinstance(getattr(torch, found.dtype, None), torch.dtype)
        except (TypeError, AttributeError):
            valid = False
        if not valid:
            raise CheckpointError(
                f"{where}: {PARENT} must have 'tensors', 'dtype' and 'sha256', got {table!r:.80}; "
                f"{EDITED}",
                code="invalid-config",
            )
        return found


def read_tensors(parent: str, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Read tensors of a dense model.

    Parameters
    ----------
    parent : str
        Folder of safetensors, or Hub id.
    names : mapping of str to str
        Key of the result -> name of the tensor in the files.
    dtype : torch.dtype
        To which they are converted.

    Raises
    ------
    RecipeError, ModelError
        If there is no such model, or it lacks a tensor.
    """
    source = locate(Model(path=parent))
    if source.gguf is not None:
        raise ModelError(
            f"{parent}: must be a folder of safetensors or a Hub id, got a GGUF file; convert it "
            f"once with `lrc export {parent} FOLDER --format dense`"
        )
    found = {}
    try:
        headers = read_folder(source.folder)
        for key, name in names.items():
            if name not in headers:
                raise ModelError(f"{parent}: has no tensor {name}; give the model it was made from")
            with safe_open(headers[name].file, framework="pt") as file:
                found[key] = file.get_tensor(name).to(dtype, copy=True)
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(
            f"{parent}: cannot be read ({error}); copy or download it again"
        ) from error
    return found


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of tensors and of their names, in the order of these."""
    digest = WeightHash()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.hexdigest()


def read_parent(weights: ParentWeights, parent: Any, folder: Path) -> dict[str, Tensor]:
    """Read what a drafter takes from its parent: module of the drafter -> weight.

    Parameters
    ----------
    weights : ParentWeights
    parent : str
        The value of `PARENT_MODEL`.
    folder : Path
        The drafter, for error messages.

    Raises
    ------
    CheckpointError
        If the parent is not there, or is another model.
    """
    if not isinstance(parent, str) or not parent:
        raise CheckpointError(
            f"{folder}: {PARENT_MODEL} must be the folder or Hub id of the model whose embedding "
            f"it uses, got {parent!r:.80}; {ANOTHER_PLACE}",
            code="missing-parent",
        )
    try:
        found = read_tensors(parent, weights.tensors, getattr(torch, weights.dtype))
    except (RecipeError, ModelError) as error:
        text = str(error).removeprefix("model.path: ")
        raise CheckpointError(
            f"{folder}: uses the embedding of {parent}, which cannot be read ({text}); "
            f"{ANOTHER_PLACE}",
            code="missing-parent",
        ) from error
    if hash_of(found) != weights.sha256:
        raise CheckpointError(
            f"{folder}: uses the embedding of its parent, but that of {parent} has other values: "
            f"it is another model, or has changed; {ANOTHER_PLACE}",
            code="other-parent",
        )
    return found


def refuse_without_embedding(block: Mapping[str, Any], folder: Path) -> None:
    """Raise an `ExportError` if a ``quantization_config`` says that weights are in the parent."""
    if PARENT in block:
        raise ExportError(
            f"{folder}: cannot be exported: it has no embedding, but uses that of its parent; "
            "export the checkpoint that it was made from"
        )


def expect_parent_(model: Any, modules: Mapping[str, str]) -> list[str]:
    """Let transformers load a model without the weights of some modules; return their names."""
    names = {f"{name}.weight" for name in modules}

    def tie(missing_keys: set[str] | None = None, **options: Any) -> Any:
        """Tie weights as if those of the parent had been in the files."""
        if missing_keys is not None:
            missing_keys -= names
        # Looked up now: transformers replaces the method while it builds a model.
        return type(model).tie_weights(model, missing_keys=missing_keys, **options)

    model.tie_weights = tie  # of this object, until its weights are complete
    for name in modules:
        model.get_submodule(name)._is_hf_initialized = True  # no random numbers are drawn
    return sorted(names)


@torch.no_grad()
def fill_from_parent_(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into modules, by the names of these, after `expect_parent_`."""
    vars(model).pop("tie_weights", None)
    for name, tensor in tensors.items():
        weight = model.get_submodule(name).weight
        if weight.shape != tensor.shape or weight.is_meta:
            where = "on disk" if weight.is_meta else f"of shape {list(weight.shape)}"
            raise CheckpointError(
                f"{name}: must be in memory with the shape of its parent's, "
                f"{list(tensor.shape)}, but is {where}; load the drafter without offloading it"
            )
        weight.copy_(tensor)
