"""Find and load models: a Hub id, a folder of safetensors, or a GGUF file."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoTokenizer, PreTrainedConfig

from lrc.compressors.io.fingerprint import fingerprint, fingerprints
from lrc.compressors.io.shards import shard_files
from lrc.compressors.models.configuration import (
    first_line,
    read_config,
    read_gguf_config,
    tokenizer_needs_code,
)
from lrc.compressors.models.model_kinds import kind_of
from lrc.compressors.models.tokenizer_files import why_no_tokenizer
from lrc.configs.errors import ModelError, RecipeError
from lrc.configs.recipe import Model

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
# Files of tokenizers and configs; never a pickle.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
CARD = "README.md"
"""The model card, for the licence that it states."""
# Those of them that a result depends on.
IDENTIFYING = (
    *("config.json", "generation_config.json", "*token*", "vocab*", "merges*", "chat_template*"),
    *("*.model", "*.jinja", "*.tiktoken"),
)
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class Source:
    """A model that has been found but not read.

    `folder` holds config and tokenizer; `gguf` is the name of the GGUF file in it, None for
    safetensors. `weights_local` is False while the weights are still on the Hub.
    """

    spec: Model
    folder: Path
    config: PreTrainedConfig
    gguf: str | None = None
    weights_local: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the reference model."""
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return dtype

    @property
    def file_bytes(self) -> int | None:
        """Bytes of the weight files of the source; None if not downloaded yet."""
        return sum(f.stat().st_size for f in self._files()) if self.weights_local else None

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the source: the content of its files, wherever they are."""
        own = ["*.py"] if self.spec.trust_remote_code else []
        small = {} if self.gguf else fingerprints(self.folder, *IDENTIFYING, *own)
        tokenizer: Any = self.spec.tokenizer
        if tokenizer and (folder := Path(tokenizer).expanduser()).is_dir():
            tokenizer = fingerprints(folder, *IDENTIFYING)
        weights = {file.name: fingerprint(file) for file in self._files()}
        return {"files": small | weights, "dtype": self.spec.dtype, "tokenizer": tokenizer}

    def _files(self) -> list[Path]:
        """Return the files that the weights are read from."""
        if self.gguf:
            return [self.folder / self.gguf]
        try:
            return shard_files(self.folder)
        except ValueError:  # `WeightReader` reports the problem
            return []


def is_on_hub(path: str) -> bool:
    """Return whether the path of a model is the id of one on the Hub, and no file or folder."""
    on_hub = HUB_ID.match(path) is not None and not path.endswith(".gguf")
    return on_hub and not Path(path).expanduser().exists()


def locate(spec: Model, *, weights: bool = True) -> Source:
    """Find a model and read its config; download weights from the Hub too if `weights`.

    Raises
    ------
    RecipeError
        A local path that does not exist.
    ModelError
        Unreachable, no safetensors, already quantized, unknown or remote architecture.
    """
    path = Path(spec.path).expanduser()
    if path.is_file():
        source = _from_file(spec, path)
    elif path.is_dir():
        if spec.file:
            return locate(spec.model_copy(update={"path": str(path / spec.file), "file": None}))
        source = Source(spec, path, read_config(path, spec))
    elif is_on_hub(spec.path):
        source = _from_hub(spec, weights=weights)
    else:
        raise RecipeError(
            f"model.path: no file or folder {spec.path!r}, and it is not a Hub id (org/name) "
            f"either; {_path_advice(path)}"
        )
    _refuse_unsafe(source)
    return source


def _from_file(spec: Model, path: Path) -> Source:
    if path.suffix.lower() == ".gguf":
        return Source(spec, path.parent, read_gguf_config(path), path.name)
    if path.suffix in UNSAFE:
        raise ModelError(_pickled(path))
    raise ModelError(
        f"model.path: {path} is a file, but only .gguf files are read as a single file; "
        "give the folder that holds config.json and *.safetensors"
    )


def _from_hub(spec: Model, *, weights: bool) -> Source:
    patterns = _small_files(spec) + ["*.safetensors"] * weights
    with _reaching(spec.path, "model.path"):
        if spec.file:
            found = hf_hub_download(spec.path, spec.file, revision=spec.revision)
        else:
            found = snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns)
    path = Path(found)
    if spec.file:
        return _from_file(spec, path)
    return Source(spec, path, read_config(path, spec), weights_local=weights)


def _small_files(spec: Model) -> list[str]:
    return [*SMALL_FILES, CARD, *["*.py"] * spec.trust_remote_code]


@contextmanager
def _reaching(name: str, where: str) -> Iterator[None]:
    try:
        yield
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        reason = f"could not be fetched from the Hub ({first_line(error)})"
        path = Path(name)
        if (path.parent.name and path.parent.is_dir()) or _similar(path):
            raise RecipeError(
                f"{where}: no folder {name!r}, and it {reason}; {_path_advice(path)}"
            ) from error
        raise ModelError(
            f"{where}: {name!r} is not a local folder and {reason}; check the name, log in for a "
            "gated model, or download it elsewhere and give the folder"
        ) from error


def _path_advice(path: Path) -> str:
    """Return what to do about a path that does not exist."""
    if near := _similar(path):
        return f"did you mean {' or '.join(near)}?"
    existing = path.parent
    while not existing.is_dir():
        existing = existing.parent
    missing = path.relative_to(existing).parts[0]
    where = "the current folder" if existing == Path() else str(existing)
    return f"check the path: {where} has no {missing!r}"


def _similar(path: Path) -> list[str]:
    """Return existing paths that differ from a missing one in its first missing part."""
    for each in (path, *path.parents):
        if each.parent.is_dir() and each.name:
            names = [found.name for found in each.parent.iterdir()]
            rest = path.relative_to(each)
            near = (each.parent / name / rest for name in get_close_matches(each.name, names))
            return [str(found) for found in near if found.exists()]
    return []


def _refuse_unsafe(source: Source) -> None:
    if source.gguf or not source.weights_local or any(source.folder.glob("*.safetensors")):
        return
    pickles = sorted(f.name for f in source.folder.iterdir() if f.suffix in UNSAFE)
    if pickles:
        raise ModelError(_pickled(source.folder / pickles[0]))
    raise ModelError(
        f"model.path: {source.folder} holds no weights (*.safetensors); give a folder written by "
        "save_pretrained, a Hub id, or a .gguf file"
    )


def _pickled(path: Path) -> str:
    return (
        f"model.path: {path} is not safetensors; pickled weights can run code and are never read: "
        "convert them once with transformers "
        "(AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)) and give FOLDER"
    )


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer of a model."""
    spec = source.spec
    folder = Path(spec.tokenizer).expanduser() if spec.tokenizer else source.folder
    if spec.tokenizer and not folder.is_dir():
        if folder.exists() or not HUB_ID.match(spec.tokenizer):
            raise RecipeError(
                f"model.tokenizer: no folder {spec.tokenizer!r}, and it is not a Hub id "
                "(org/name) either; give the folder that holds tokenizer.json"
            )
        with _reaching(spec.tokenizer, "model.tokenizer"):
            folder = Path(snapshot_download(spec.tokenizer, allow_patterns=_small_files(spec)))
    try:
        if source.gguf and not spec.tokenizer:
            from lrc.compressors.models.gguf_config import configs_read_once

            with configs_read_once():
                return AutoTokenizer.from_pretrained(folder, gguf_file=source.gguf)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # transformers and gguf raise nearly anything
        if (needed := tokenizer_needs_code(error, folder)) is not None:
            raise needed from error
        in_gguf = source.gguf and not spec.tokenizer
        reason = first_line(error) if in_gguf else why_no_tokenizer(folder, error)
        raise ModelError(
            f"model: no tokenizer could be loaded from {folder} ({reason}); put "
            "tokenizer.json into the folder of the model or name its folder in model.tokenizer"
        ) from error


def load_dense(source: Source, weights: Path, *, dtype: torch.dtype, device: str) -> Any:
    """Load the whole reference model: weights of the recipe's precision, run in `dtype`.

    `weights` is the folder of safetensors (for GGUF, the converted one); `device` may be ``auto``,
    which spreads the model over all devices.
    """
    loaded: Any = kind_of(source.config).auto_class.from_pretrained(
        weights,
        config=deepcopy(source.config),
        dtype=dtype,
        device_map=device,
        trust_remote_code=source.spec.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    model = _complete(loaded, weights)
    if dtype != source.dtype:  # parameters only, as in a checkpoint, not buffers
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(source.dtype))
    return model.eval()


def _complete(loaded: tuple[Any, Mapping[str, Any]], where: Path) -> Any:
    """Return a loaded model, unless transformers has filled tensors of it with random numbers."""
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"model.path: transformers finds no {missing[0]} in {where}, one of {len(missing)} "
            "tensors; copy or download it again, or give the original model"
        )
    return model
