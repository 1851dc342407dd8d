"""Load what a user points at, compressed or dense, with one clear error when it cannot be."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.config_tables import check_tables
from lrc.compressors.checkpoint.format import COPY_AGAIN
from lrc.compressors.checkpoint.writer import sha256
from lrc.compressors.io.shards import Header, read_headers, shard_files
from lrc.configs.errors import CheckpointError


def load_checkpoint(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """Load a causal language model from a local folder.

    Parameters
    ----------
    folder : Path
        A compressed checkpoint, or any folder that `save_pretrained` wrote.
    dtype : torch.dtype, optional
        Precision to run in; the stored one if left out.

    Raises
    ------
    CheckpointError
        Missing, truncated or tampered files, or a newer format.
    """
    read_config(folder)
    check_files(folder)
    try:
        with _without_bars():
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or "auto",
                device_map=device,
                use_safetensors=True,
                output_loading_info=True,
            )
        model, loading = found
    except CheckpointError as error:  # of our own quantizer, which does not know the folder
        raise CheckpointError(f"{folder}: {error}", code=error.code) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(
            f"{folder}: cannot be loaded ({lines[0][:200]}); {COPY_AGAIN}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random numbers
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder}: the weights lack {', '.join(missing[:3])}{more}; {COPY_AGAIN}"
        )
    model = model.eval()
    if hasattr(model, "ct_decompress_hook"):
        # compressed-tensors puts weights together at the first call of the whole model; whoever
        # calls a part of it would find none.
        with torch.no_grad(), _without_bars():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Draw no bars, not even those of compressed-tensors, which heed no environment variable."""
    drawn = tqdm.__init__

    def never(self: Any, *arguments: Any, **options: Any) -> None:
        drawn(self, *arguments, **{**options, "disable": True})

    tqdm.__init__ = never
    try:
        yield
    finally:
        tqdm.__init__ = drawn


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that lies with a checkpoint.

    Raises
    ------
    CheckpointError
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises nearly anything here
        raise CheckpointError(
            f"{folder}: no tokenizer could be loaded ({type(error).__name__}); copy the checkpoint "
            "again, with tokenizer.json"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint and check the version of our block, if there is one.

    Raises
    ------
    CheckpointError
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "no checkpoint here (no config.json)" if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder}: {what}; the checkpoint of a run is its folder OUTPUT/checkpoint"
        )
    config = read_object(path)
    block = config.get("quantization_config") or {}
    ours = isinstance(block, dict) and block.get("quant_method") == layout.QUANT_METHOD
    if ours:
        layout.check_version(block.get("format_version"), f"{path}: quantization_config")
        layout.parse_modules(block.get("modules", {}), f"{path}: quantization_config")
        check_tables(block, f"{path}: quantization_config")
    elif (folder / layout.MANIFEST).is_file() and not is_plain(folder):
        raise CheckpointError(
            f"{path}: has lost its quantization_config, which names the matrices; {COPY_AGAIN}"
        )
    return config


def is_plain(folder: Path) -> bool:
    """Say whether lrc wrote a checkpoint that needs no lrc: all its matrices are dense.

    Raises
    ------
    CheckpointError
    """
    return bool(read_object(folder / layout.MANIFEST).get("plain"))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises
    ------
    CheckpointError
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable JSON file ({error}); {COPY_AGAIN}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {value!r:.60}; {COPY_AGAIN}")
    return value


def check_files(folder: Path) -> dict[str, Header]:
    """Read the header of every shard; return tensor name -> header.

    Raises
    ------
    CheckpointError
        If a file is truncated or a shard named by the index is missing.
    """
    try:
        headers = read_headers(shard_files(folder))
    except ValueError as error:
        raise CheckpointError(f"{error}; {COPY_AGAIN}") from error
    if not headers:
        raise CheckpointError(
            f"{folder}: holds no weights as safetensors, the only form read; {COPY_AGAIN}"
        )
    return headers


def verify_hashes(folder: Path) -> list[str]:
    """Return one sentence for every file that is not what was written.

    Raises
    ------
    CheckpointError
        If there is no manifest to compare with.
    """
    path = folder / layout.MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {layout.MANIFEST}, the hashes to compare with; {COPY_AGAIN}"
        )
    hashes = read_object(path).get("sha256")
    if not isinstance(hashes, dict):
        raise CheckpointError(f"{path}: holds no hashes; {COPY_AGAIN}")
    there = [name for name in hashes if (folder / name).is_file()]
    found = dict(zip(there, sha256(folder / name for name in there), strict=True))
    problems = [f"{name} is missing" for name in hashes if name not in found]
    return problems + [
        f"{name} has changed since it was written" for name in found if found[name] != hashes[name]
    ]
