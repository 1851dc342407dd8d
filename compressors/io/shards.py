"""Find the safetensors files of a folder and read their headers, but no tensor."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open

from lrc.compressors.io.json_text import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 2**20


@dataclass(frozen=True)
class Header:
    """File, shape and safetensors type (``BF16``, ``I16``) of a tensor, and its place there."""

    file: Path
    shape: list[int]
    dtype: str
    name: str
    offset: int
    """Of its first byte, from the start of the file."""
    nbytes: int

    @property
    def is_number(self) -> bool:
        """Whether the tensor contains parameters; sentinels, codes and indices are integers."""
        return not self.dtype.startswith(("U", "I", "BOOL"))


def shard_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, in the order in which transformers looks for them.

    Raises
    ------
    ValueError
        If the index cannot be read, or names a missing file or one that is not in the folder, or if
        transformers would find no weights.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        others = sorted(folder.glob("*.safetensors"))
        if others:
            raise ValueError(
                f"{others[0]}: {folder} has neither {SINGLE} nor {INDEX}, by which transformers "
                "finds the weights"
            )
        return []
    try:
        names = set(_weight_map(index).values())
        files = [listed_file(folder, name) for name in sorted(names)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{index}: not an index of shards ({error})") from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: missing, one of {len(missing)} of {len(files)} shards")
    return files


def read_folder(folder: Path) -> dict[str, Header]:
    """Read the headers of all weight files of a folder; return tensor name -> header.

    Raises
    ------
    ValueError
        As `shard_files` and `read_headers`, or if a tensor in the index is in no file.
    """
    files = shard_files(folder)
    headers = read_headers(files)
    if files != [folder / SINGLE] and files:
        listed = _weight_map(folder / INDEX)
        lost = [name for name in listed if name not in headers]
        if lost:
            raise ValueError(
                f"{folder / listed[lost[0]]}: lacks {lost[0]}, one of {len(lost)} of {len(listed)} "
                "tensors of the index that no shard holds"
            )
    return headers


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
        If a file is not a complete safetensors file, or two hold different tensors of one name.
    """
    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt"), file.open("rb") as raw:  # the former checks sizes
                length = int.from_bytes(raw.read(8), "little")
                entries = parse_json(raw.read(length).decode())
        except (SafetensorError, OSError) as error:
            reason = str(error).strip()[:200]
            raise ValueError(f"{file}: not a whole safetensors file ({reason})") from error
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            offset = 8 + length + start
            found = Header(file, entry["shape"], entry["dtype"], name, offset, end - start)
            other = headers.setdefault(name, found)
            if not same_tensor(other, found):
                raise ValueError(f"{file}: {name} differs from that in {other.file.name}")
    return headers


def same_tensor(a: Header, b: Header) -> bool:
    """Return whether two stored tensors agree bit by bit."""
    if a is b or (a.shape, a.dtype) != (b.shape, b.dtype):
        return a is b
    sizes = [min(CHUNK, a.nbytes - done) for done in range(0, a.nbytes, CHUNK)]
    with a.file.open("rb") as one, b.file.open("rb") as other:
        one.seek(a.offset)
        other.seek(b.offset)
        return all(one.read(size) == other.read(size) for size in sizes)


def unread_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files in a folder that are not among its weights."""
    files = shard_files(folder)
    return sorted(file.name for file in folder.glob("*.safetensors") if file not in files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards ({error!r})") from error
