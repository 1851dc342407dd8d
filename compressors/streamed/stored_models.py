"""Open any stored model to be read one decoder layer at a time: folder, Hub id or GGUF file."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from lrc.compressors.calibrate.layer_check import check_layers, simulated_calls
from lrc.compressors.checkpoint.reader import Contents, read_contents, stored_dtype
from lrc.compressors.models.architecture import build
from lrc.compressors.models.source import locate
from lrc.compressors.models.source_check import check_contents
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.streamed.checkpoint_layers import open_checkpoint
from lrc.compressors.streamed.streamed_model import ModelFiles
from lrc.configs.recipe import Model


def open_model(
    path: str, scratch: Path, *, device: str, trust_remote_code: bool = False
) -> ModelFiles:
    """Open a model that runs in its stored precision, or in float32 on a CPU.

    Parameters
    ----------
    path : str
        Folder, Hub id or GGUF file.
    scratch : Path
        Empty folder into which a GGUF file is converted.
    device : str
        On which the model will run.
    trust_remote_code : bool
        Whether to run the Python code of the model, if it has any.

    Raises
    ------
    CheckpointError
        A damaged checkpoint.
    ModelError
        A model that cannot be read, that another tool compressed, or whose architecture is not
        supported.
    """
    on_cpu = torch.device(device).type == "cpu"
    folder = Path(path).expanduser()
    if folder.is_dir():
        contents = read_contents(folder)
        if contents.manifest is not None or contents.needs_lrc:
            dtype = torch.float32 if on_cpu else stored_dtype(contents)
            return open_checkpoint(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    source = locate(Model(path=path, trust_remote_code=trust_remote_code))
    if source.gguf is None:
        spec = source.spec.model_copy(update={"dtype": _precision(read_contents(source.folder))})
        source = replace(source, spec=spec)
    source, architecture, _ = check_contents(source, build(source))
    weights = source.folder
    if source.gguf is not None:
        # It imports the package gguf, which takes a third of a second.
        from lrc.compressors.checkpoint.gguf_conversion import convert_gguf

        convert_gguf(source, scratch)
        weights = scratch
    architecture = check_layers(architecture)
    reader = WeightReader(weights, architecture)
    dtype = torch.float32 if on_cpu else source.dtype
    return ModelFiles(architecture, reader, simulated_calls(architecture), dtype)


def _precision(contents: Contents) -> str:
    """Return the stored precision, if weights can be read in it, else ``float32``."""
    known: Any = Model.model_fields["dtype"].annotation
    found = str(stored_dtype(contents)).removeprefix("torch.")
    return found if found in get_args(known) else "float32"
