"""Copy the files that belong to a model besides its weights and config."""

import json
import re
import shutil
from pathlib import Path

from lrc.compressors.models.source import Source

FORMATS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab", ".spm")
"""Of configurations, tokenizers, processors and chat templates."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
TRAINING = ("adapter_", "trainer_state", "all_results", "train_results", "eval_results")
MAX_BYTES = 2**26
"""Larger files are data; the largest tokenizers have 40 MB."""


def copy_companions(source: Source, folder: Path) -> None:
    """Copy what a loader may need in addition to weights, config and tokenizer.

    These are processors of images and sound, chat templates, vocabularies of other tokenizer
    libraries, the generation config, the modules that sentence-transformers adds to an encoder, and
    the code of the model if the recipe trusts it. Adapters, indices of weights, states of trainers
    and hidden files are left out. Files that exist in `folder` are kept. Next to a GGUF file may be
    anything, so nothing is copied from there.
    """
    if source.gguf is not None:
        return
    for file in source.folder.iterdir():
        if _belongs(file, source) and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    for name in _module_folders(source.folder / "modules.json"):
        (folder / name).mkdir(exist_ok=True)
        for file in (source.folder / name).iterdir():
            if file.is_file() and file.suffix in (*FORMATS, ".safetensors"):
                shutil.copyfile(file, folder / name / file.name)


def _module_folders(listing: Path) -> list[str]:
    """Return the folders of a list of sentence-transformers' modules, such as ``1_Pooling``."""
    try:
        paths = [str(module["path"]) for module in json.loads(listing.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):  # of another program
        return []
    return [
        path for path in paths if re.fullmatch(r"\w+", path) and (listing.parent / path).is_dir()
    ]


def _belongs(file: Path, source: Source) -> bool:
    if file.suffix == ".py":
        return source.spec.trust_remote_code
    if file.name.startswith((".", *TRAINING)) or not {*file.suffixes}.isdisjoint(WEIGHTS):
        return False
    # Another tokenizer replaces all files of the source's.
    tokenizer = source.spec.tokenizer is None or file.name.endswith("_config.json")
    small = file.is_file() and file.stat().st_size <= MAX_BYTES
    return file.suffix in FORMATS and tokenizer and small
