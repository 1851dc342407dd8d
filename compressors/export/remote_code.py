"""Write a checkpoint that transformers loads without lrc, with the code of its layers in a file."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.checkpoint.elastic_budgets import BUDGET
from lrc.compressors.checkpoint.parent_weights import refuse_without_embedding
from lrc.compressors.checkpoint.reader import Contents, check_checkpoint, is_ours
from lrc.compressors.export import modeling_lrc as runtime
from lrc.compressors.io.machine import OnStep
from lrc.compressors.io.shards import INDEX, shard_files
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers import TensorSpec, TensorSpecs
from lrc.compressors.layers.experts import split_modules
from lrc.compressors.models.architecture import build
from lrc.compressors.models.configuration import first_line, read_config
from lrc.compressors.models.contents import renamed
from lrc.compressors.models.source import Source
from lrc.configs.errors import ExportError
from lrc.configs.recipe import Model

FILE = Path(runtime.__file__)
LARGEST = (
    "the checkpoint is elastic, and this is its largest budget; for another one, export it with "
    "--keep first"
)


class RemoteCodeExport:
    """An export that has been checked: the file with the code builds the model of the checkpoint.

    Parameters
    ----------
    folder : Path
        A compressed checkpoint.
    trust_remote_code : bool
        Whether to copy the code of its tokenizer, if it has any.

    Attributes
    ----------
    notes : list of str
        What the user should know about the result.

    Raises
    ------
    CheckpointError, ModelError
        If the folder is damaged.
    ExportError
        If it loads without lrc already, or the file cannot build its model.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder = folder
        contents = check_checkpoint(folder)
        _refuse_other_formats(folder, contents.config)
        spec = Model(path=str(folder), dtype="float32", trust_remote_code=trust_remote_code)
        self._source = Source(spec, folder, read_config(folder, spec, ours=True))
        model = build(self._source).model
        name = type(model).__name__
        if any(split_modules(model)):
            raise ExportError(
                f"{folder}: cannot be exported as remote-code: {FILE.name} does not compute with "
                f"the separate experts of {name}; load it with lrc, or export it with --format "
                "dense"
            )
        self._config = _config(contents, name)
        self.notes = [LARGEST] if layout.ELASTIC in contents.config[runtime.BLOCK] else []
        self._check(contents, name)

    def write(self, out: Path, on_step: OnStep) -> None:
        """Fill an empty folder: weights as they are, config, tokenizer and the file."""
        files = shard_files(self._folder)
        for done, file in enumerate(files, start=1):
            shutil.copyfile(file, out / file.name)
            on_step("export", done, len(files))
        if (self._folder / INDEX).is_file():
            shutil.copyfile(self._folder / INDEX, out / INDEX)
        text = json.dumps(self._config, indent=2, sort_keys=True) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
        copy_companions(self._source, out)
        shutil.copyfile(FILE, out / FILE.name)

    def _check(self, contents: Contents, name: str) -> None:
        """Build the model without weights, and compare its tensors with those of the files."""
        config: Any = deepcopy(self._source.config)
        config.quantization_config = self._config[runtime.BLOCK]
        try:
            with torch.device("meta"):
                model: Any = getattr(runtime, name)(config)
        except Exception as error:  # modeling code may raise anything
            raise ExportError(
                f"{self._folder}: cannot be exported as remote-code: {FILE.name} cannot build "
                f"{name} ({first_line(error)}); export it with --format dense"
            ) from error
        stored = renamed(contents.headers, get_model_conversion_mapping(model), model)
        found = {new: contents.headers[key] for key, (new, _) in stored.items()}
        expected = _tensors(model)
        wrong = layout.mismatches(expected, found)
        wrong += [f"{each}: expected nothing" for each in found.keys() - model.state_dict().keys()]
        if wrong:
            raise ExportError(
                f"{self._folder}: cannot be exported as remote-code: the model that {FILE.name} "
                f"builds does not have the tensors of the checkpoint: {shortened(sorted(wrong))}; "
                "export it with --format dense"
            )


def _refuse_other_formats(folder: Path, config: dict[str, Any]) -> None:
    """Refuse checkpoints that load without lrc already, or that come with other code."""
    if not is_ours(config):
        method = (config.get(runtime.BLOCK) or {}).get("quant_method")
        loads = "transformers" + (f" and the package {method}" if method else "")
        raise ExportError(
            f"{folder}: --format remote-code is for checkpoints that need lrc, and this one loads "
            f"with {loads} alone; use the folder as it is"
        )
    refuse_without_embedding(config[runtime.BLOCK], folder)
    if "auto_map" in config:
        raise ExportError(
            f"{folder}: cannot be exported as remote-code: the model comes with code already "
            "(auto_map in config.json), which this format would replace; load it with lrc, or "
            "export it with --format dense"
        )


def _config(contents: Contents, name: str) -> dict[str, Any]:
    """Return the ``config.json`` of a model of the class `name`."""
    config = {key: value for key, value in contents.config.items() if key != BUDGET}
    block = {key: value for key, value in config[runtime.BLOCK].items() if key != layout.ELASTIC}
    block["modules"] = {module: c.at_budget(0).to_json() for module, c in contents.modules.items()}
    auto_map = {contents.kind.auto_class.__name__: f"{FILE.stem}.{name}"}
    names = config.get("architectures") or [name]  # missing if the source was a GGUF file
    return {**config, "architectures": names, runtime.BLOCK: block, "auto_map": auto_map}


def _tensors(model: Any) -> TensorSpecs:
    """Return the tensors that a model needs, without tied ones."""
    return {
        name: TensorSpec(list(tensor.shape), None if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
