"""Load what a user points at, compressed or dense, with one clear error when it cannot be."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.writer import sha256
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
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", device_map=device, use_safetensors=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(
            f"{folder}: cannot be loaded ({lines[0][:200]}); copy or download it again, or "
            "compress again"
        ) from error
    return model.eval()


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
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no checkpoint here (no config.json); the checkpoint of a run is its folder "
            "OUTPUT/checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable JSON file ({error}); copy the checkpoint again"
        ) from error
    block = config.get("quantization_config") or {}
    if block.get("quant_method") == layout.QUANT_METHOD:
        layout.check_version(block.get("format_version"), f"{path}: quantization_config")
        layout.check_modules(block.get("modules", {}), f"{path}: quantization_config")
    return config


def check_files(folder: Path) -> dict[str, list[int]]:
    """Read the header of every shard; return tensor name -> shape.

    Raises
    ------
    CheckpointError
        If a file is truncated or a shard named by the index is missing.
    """
    shapes: dict[str, list[int]] = {}
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    shapes[name] = list(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({str(error).strip()[:200]}); copy or "
                "download the checkpoint again"
            ) from error
    return shapes


def verify_hashes(folder: Path) -> list[str]:
    """Return one sentence for every file that is not what was written.

    Raises
    ------
    CheckpointError
        If there is no manifest to compare with.
    """
    path = folder / layout.MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {layout.MANIFEST}; it was not written by lrc compress")
    hashes: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    problems = []
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif sha256(file) != expected:
            problems.append(f"{name} has changed since it was written")
    return problems


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder}: holds no weights (*.safetensors)")
    return shards
