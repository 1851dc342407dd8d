"""The models to measure: where they are, and which of them is the dense one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig

from lrc.compressors.benchmark.grid import Settings
from lrc.compressors.benchmark.memory import estimate_bytes
from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import read_object
from lrc.compressors.checkpoint.reader import Contents, read_contents
from lrc.compressors.models import source as models
from lrc.compressors.models.configuration import check_code, first_line, refuse_adapter
from lrc.compressors.models.model_kinds import refuse_encoder, refuse_encoder_decoder
from lrc.configs.errors import CheckpointError, UsageError
from lrc.configs.recipe import Model

GIVE_DENSE = "give --against DENSE for ratios"


@dataclass(frozen=True)
class Target:
    """A model that has been found but not loaded."""

    name: str
    """As the user wrote it."""
    folder: Path
    """Where its config and safetensors are; those of a GGUF file have been converted."""
    vocabulary: int
    """Number of token ids."""
    context: int | None
    """Longest text in tokens, as far as the config says."""
    file_bytes: int
    """Of its safetensors files."""
    contents: Contents

    def loaded_bytes(self, dtype: torch.dtype) -> int:
        """Estimate the bytes of the weights, loaded in `dtype`."""
        return estimate_bytes(self.contents, dtype)

    def read_through(self) -> None:
        """Read the weight files, so that loading times do not depend on what the disk caches."""
        for path in {header.file for header in self.contents.headers.values()}:
            with path.open("rb") as file:
                while file.read(2**24):
                    pass


def find_target(name: str, scratch: Path, *, trusted: bool = False) -> Target:
    """Find a folder, Hub id or GGUF file, which is converted into a folder inside `scratch`.

    Raises
    ------
    UsageError
        If there is no such file or folder.
    CheckpointError, ModelError
        If it is damaged or cannot be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        found = models.locate(Model(path=name, trust_remote_code=trusted))
        folder = found.folder
        if found.gguf is not None:
            # It imports the package gguf, which takes a third of a second.
            from lrc.compressors.checkpoint.gguf_conversion import convert_gguf

            folder = scratch / f"{len([*scratch.iterdir()])}"
            convert_gguf(found, folder)
    refuse_adapter(folder)
    contents = read_contents(folder)
    check_code(contents.config, folder, trusted=trusted)
    refuse_encoder(contents.kind, name, "lrc bench")
    refuse_encoder_decoder(contents.kind, name, "lrc bench")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        text = config.get_text_config(decoder=True)
        vocabulary = int(text.vocab_size)
    except Exception as error:  # transformers raises nearly anything
        raise CheckpointError(
            f"{folder}: its config.json cannot be read ({first_line(error)}); {layout.COPY_AGAIN}"
        ) from error
    files = {header.file for header in contents.headers.values()}
    size = sum(file.stat().st_size for file in files)
    context = getattr(text, "max_position_embeddings", None)
    return Target(name, folder, vocabulary, context, size, contents)


def find_dense(names: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the source model that checkpoints name in their reports, if it is on this disk.

    Returns
    -------
    dense : str or None
    note : str or None
        Why there is none.
    """
    sources = dict.fromkeys(filter(None, map(_source_of, names)))
    if not sources:
        return None, f"no model names its source in a report; {GIVE_DENSE}"
    if len(sources) > 1:
        return None, f"the models were made from {' and '.join(sources)}; {GIVE_DENSE}"
    (source,) = sources
    if Path(source).expanduser().exists():
        return source, None
    if models.HUB_ID.match(source):
        try:
            folder = snapshot_download(source, local_files_only=True)
        except (LocalEntryNotFoundError, OSError):
            pass
        else:
            if any(Path(folder).glob("*.safetensors")):
                return source, None
    return None, f"the source model, {source}, is not on this disk; {GIVE_DENSE}"


def is_same(one: str, other: str) -> bool:
    """Return whether two names are those of the same folder, file or Hub id."""
    first, second = (Path(name).expanduser() for name in (one, other))
    return one == other or (first.exists() and second.exists() and first.samefile(second))


def check_targets(targets: Sequence[Target], settings: Settings) -> None:
    """Check that all models can read the same prompts.

    Raises
    ------
    UsageError
        If vocabularies differ, or a prompt and what follows is longer than a model allows.
    """
    first, problems = targets[0], []
    for other in targets[1:]:
        if other.vocabulary != first.vocabulary:
            problems.append(
                f"{other.name}: has a vocabulary of {other.vocabulary:,} tokens, but {first.name} "
                f"has {first.vocabulary:,}; compare it with a model of the same vocabulary"
            )
    longest = max(settings.prompts)
    for target in targets:
        if target.context is not None and longest + settings.tokens > target.context:
            problems.append(
                f"--prompt: {longest:,} tokens and {settings.tokens:,} new ones must be at most "
                f"{target.context:,} together, the context of {target.name}; lower --prompt or "
                "--tokens"
            )
            break
    if problems:
        raise UsageError(problems)


def _source_of(name: str) -> str | None:
    """Return the source model in the report of a checkpoint."""
    path = Path(name).expanduser() / layout.REPORT
    if not path.is_file():
        return None
    try:
        model = read_object(path)["recipe"]["model"]
        source = str(model["path"])
        return str(Path(source) / model["file"]) if model.get("file") else source
    except (CheckpointError, KeyError, TypeError, AttributeError):  # an edited report
        return None
