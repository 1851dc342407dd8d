"""Find the safetensors files of a folder and read their headers, but no tensor."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Header:
    """File, shape and safetensors type (``BF16``, ``I16``) of a tensor."""

    file: Path
    shape: list[int]
    dtype: str


def shard_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, in the order in which transformers looks for them.

    Raises
    ------
    ValueError
        If the index cannot be read or names a missing file.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards ({error!r})") from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: missing, one of {len(missing)} of {len(files)} shards")
    return files


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Read the headers of safetensors files; return tensor name -> header.

    Raises
    ------
    ValueError
        If a file is not a complete safetensors file.
    """
    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    tensor = shard.get_slice(name)
                    headers[name] = Header(file, list(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            reason = str(error).strip()[:200]
            raise ValueError(f"{file}: not a whole safetensors file ({reason})") from error
    return headers
