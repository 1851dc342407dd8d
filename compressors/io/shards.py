"""Find the safetensors files of a folder and read their headers, but no tensor."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open

from lrc.compressors.io.json_text import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Header:
    """File, shape and safetensors type (``BF16``, ``I16``) of a tensor."""

    file: Path
    shape: list[int]
    dtype: str

    @property
    def is_number(self) -> bool:
        """Whether the tensor contains parameters; sentinels, codes and indices are integers."""
        return not self.dtype.startswith(("U", "I", "BOOL"))


def shard_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, in the order in which transformers looks for them.

    Raises
    ------
    ValueError
        If the index cannot be read, or names a missing file or one that is not in the folder.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [listed_file(folder, name) for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards ({error!r})") from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: missing, one of {len(missing)} of {len(files)} shards")
    return files


def listed_file(folder: Path, name: object) -> Path:
    """Return the path of a file that a list in `folder` names.

    Raises
    ------
    ValueError
        If the name is not a relative path that stays in the folder.
    """
    inside = isinstance(name, str) and name.isprintable() and bool(name)
    path = PurePath(name if isinstance(name, str) else "")
    if not inside or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r:.80} must be the name of a file in the folder")
    return folder / path


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Read the headers of safetensors files; return tensor name -> header.

    Raises
    ------
    ValueError
        If a file is not a complete safetensors file, or two files contain the same tensor.
    """
    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    tensor = shard.get_slice(name)
                    header = Header(file, list(tensor.get_shape()), tensor.get_dtype())
                    if headers.setdefault(name, header) is not header:
                        raise ValueError(f"{file}: {name} is also in {headers[name].file.name}")
        except (SafetensorError, OSError) as error:
            reason = str(error).strip()[:200]
            raise ValueError(f"{file}: not a whole safetensors file ({reason})") from error
    return headers
