"""Write a compressed checkpoint, one shard in memory at a time."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.io.journal import publish, storage_errors

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 10**9


def write_weights(
    folder: Path,
    meta: dict[str, Tensor],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors shards under the names and with the index that transformers expects.

    Parameters
    ----------
    folder : Path
        Existing folder.
    meta : dict of str to Tensor
        Every tensor of the checkpoint, in order, on the meta device.
    read : callable
        Returns the tensor of a name; called once each, shard after shard.
    max_shard_bytes : int
        A shard is held in memory while it is written.
    """
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: read(name).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_config(folder: Path, config: Any, block: Mapping[str, Any], dtype: str) -> None:
    """Write ``config.json``: that of the architecture, with `quantization_config` if not empty."""
    content = json.loads(config.to_json_string(use_diff=True)) | {"dtype": dtype}
    for key in ("_name_or_path", "quantization_config"):
        content.pop(key, None)
    if block:
        content["quantization_config"] = block
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_manifest(folder: Path, *, plain: bool) -> None:
    """Write the SHA-256 of every file of the checkpoint except the report, which is added later.

    `plain` records that the checkpoint loads without lrc, so that no table of modules is expected.
    """
    later = {layout.MANIFEST, layout.REPORT, "README.md"}
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    names = sorted(found - later)
    hashes = dict(zip(names, sha256(folder / name for name in names), strict=True))
    manifest = {"format_version": layout.FORMAT_VERSION, "plain": plain, "sha256": hashes}
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / layout.MANIFEST).write_text(text, encoding="utf-8")


def sha256(paths: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of every file, read in pieces, several files at a time."""

    def of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        return list(pool.map(of, paths))


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to write into, which gets its final name only when it is complete.

    On a clean exit it is flushed and renamed, on an error removed.

    Raises
    ------
    OutputError
        If something could not be written.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        with storage_errors(final):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir(parents=True)
            yield partial
            publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
