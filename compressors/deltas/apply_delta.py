"""Write the tuned model, or the adapter, that a delta describes."""

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.checkpoint.writer import write_weights
from lrc.compressors.deltas.delta_format import Delta, read_delta
from lrc.compressors.deltas.lora_folder import WEIGHTS
from lrc.compressors.deltas.weight_files import WeightFiles
from lrc.compressors.io.machine import OnStep
from lrc.compressors.io.weight_hash import WeightHash
from lrc.configs.errors import DeltaError


def apply_delta(base: str, delta_folder: Path, folder: Path, on_step: OnStep) -> dict[str, Any]:
    """Fill an empty folder with the tuned model, or with the adapter for PEFT.

    Parameters
    ----------
    base : str
        Folder or Hub id of the base model.
    delta_folder : Path
        Folder that `make_delta` wrote.
    folder : Path
        Existing folder.

    Returns
    -------
    dict
        Kind of the result and its number of changed tensors.

    Raises
    ------
    DeltaError
        If the delta is damaged, or was made for another base model.
    ModelError, RecipeError
        If the base model cannot be read.
    """
    delta = read_delta(delta_folder)
    original = WeightFiles(base)
    if lost := delta.base_dtypes.keys() - original.headers.keys():
        raise DeltaError(
            f"{base}: has no {min(lost)}, and is not the model that {delta_folder} was made for "
            f"({delta.description['base']['name']}); give that model",
            code="other-base",
        )
    found = WeightHash()
    for done, name in enumerate(sorted(original.headers), 1):
        found.add(name, original.read(name))
        on_step("check", done, len(original.headers))
    delta.refuse_other_base(base, found.hexdigest(), "sha256")
    if delta.is_adapter:
        save_file(delta.read_adapter(), folder / WEIGHTS, metadata={"format": "pt"})
    else:
        _write_model(original, delta, folder, on_step)
    for file in delta.files:
        shutil.copyfile(file, folder / file.name)
    if not delta.is_adapter:
        copy_companions(original.source, folder)
    return {"kind": delta.description["kind"], "tensors": len(delta.records)}


def _write_model(original: WeightFiles, delta: Delta, folder: Path, on_step: OnStep) -> None:
    meta = {}
    for name in original.headers:
        record = delta.records.get(name)
        dtype = getattr(torch, record.dtype) if record else original.read(name).dtype
        meta[name] = torch.empty(original.headers[name].shape, dtype=dtype, device="meta")
    done = count(1)

    def read(name: str) -> Tensor:
        on_step("apply", next(done), len(meta))
        tensor = original.read(name)
        return delta.read(name, tensor) if name in delta.records else tensor

    write_weights(folder, meta, read)
