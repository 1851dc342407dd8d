"""Load a checkpoint from a local folder, compressed or dense, and report what is wrong with it."""

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


def load_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model from a local folder.

    Parameters
    ----------
    folder : Path
        A compressed checkpoint, or any folder that `save_pretrained` wrote.
    dtype : torch.dtype, optional
        Precision to run in; the stored one if left out.
    trust_remote_code : bool
        Whether to run the Python code of the checkpoint, if it has any.

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
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        model, loading = found
    except CheckpointError as error:  # from `LrcQuantizer`, which does not know the folder
        raise CheckpointError(f"{folder}: {error}", code=error.code) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(
            f"{folder}: cannot be loaded ({lines[0][:200]}); {COPY_AGAIN}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers has initialized them with random numbers
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder}: the weights lack {', '.join(missing[:3])}{more}; {COPY_AGAIN}"
        )
    model = model.eval()
    if hasattr(model, "ct_decompress_hook"):
        # compressed-tensors decompresses weights at the first call of the whole model; calls of
        # its modules need them too.
        with torch.no_grad(), _without_bars():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disable progress bars, including those of compressed-tensors, which have no option."""
    drawn = tqdm.__init__

    def never(self: Any, *arguments: Any, **options: Any) -> None:
        drawn(self, *arguments, **{**options, "disable": True})

    tqdm.__init__ = never
    try:
        yield
    finally:
        tqdm.__init__ = drawn


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint; for the code of one, see `load_checkpoint`.

    Raises
    ------
    CheckpointError
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything here
        raise CheckpointError(
            f"{folder}: no tokenizer could be loaded ({type(error).__name__}); copy the checkpoint "
            "again, with tokenizer.json"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint and check its block of lrc, if there is one.

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
    where = f"{path}: quantization_config"
    if isinstance(block, dict) and block.get("quant_method") == layout.QUANT_METHOD:
        layout.check_version(block.get("format_version"), where)
        layout.parse_modules(block.get("modules", {}), where)
        check_tables(block, where)
    elif (folder / layout.MANIFEST).is_file() and not is_plain(folder):
        raise CheckpointError(
            f"{path}: has lost its quantization_config, which names the matrices; {COPY_AGAIN}"
        )
    return config


def is_plain(folder: Path) -> bool:
    """Return whether a checkpoint of lrc loads without lrc, as its manifest says.

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
            f"{folder}: holds no weights as safetensors, the only supported format; {COPY_AGAIN}"
        )
    return headers


def verify_hashes(folder: Path) -> list[str]:
    """Return one sentence for every file that is missing or differs from its hash.

    Raises
    ------
    CheckpointError
        If there is no manifest.
    """
    path = folder / layout.MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {layout.MANIFEST} with the hashes to compare; {COPY_AGAIN}"
        )
    hashes = read_object(path).get("sha256")
    if not isinstance(hashes, dict):
        raise CheckpointError(f"{path}: holds no hashes; {COPY_AGAIN}")
    present = [name for name in hashes if (folder / name).is_file()]
    found = dict(zip(present, sha256(folder / name for name in present), strict=True))
    problems = [f"{name} is missing" for name in hashes if name not in found]
    return problems + [
        f"{name} has changed since it was written" for name in found if found[name] != hashes[name]
    ]
